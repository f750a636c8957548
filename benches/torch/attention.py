"""What a query sees, three ways: query i sees the keys row_start[i] <= j < row_end[i] of its row."""

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def is_causal(row_start, row_end):
    """Whether the rows see what a causal mask shows and nothing else: then SDPA needs no mask."""
    t = torch.arange(row_end.shape[-1], device=row_end.device)
    return bool((row_start == 0).all() and (row_end == t + 1).all())


def sees(row_start, row_end, keys):
    """[B, 1, T, keys] of booleans."""
    key = torch.arange(keys, device=row_end.device)
    return ((key >= row_start[..., None]) & (key < row_end[..., None]))[:, None]


def sdpa(row_start, row_end, keys, causal, grouped):
    mask = None if causal else sees(row_start, row_end, keys)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)


def block_mask(row_start, row_end, keys, compiled=False):
    """FlexAttention's lists of blocks for these rows: made anew for every batch."""
    b, t = row_end.shape

    def mask_mod(b, h, q, k):
        return (k >= row_start[b, q]) & (k < row_end[b, q])

    return create_block_mask(mask_mod, b, None, t, keys, device=row_end.device, BLOCK_SIZE=128, _compile=compiled)


def flex(blocks, grouped, attend=flex_attention):
    return lambda q, k, v: attend(q, k, v, block_mask=blocks, enable_gqa=grouped)
