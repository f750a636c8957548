"""Holds what `transfusion kernels bench --json` measured against PyTorch on the same GPU, in the same run.

    python3 tools/gpu-peers.py bench.log

Products against cuBLAS, attention against the flash back end of scaled_dot_product_attention (causal rows
only: it has no other mask), row kernels against the bandwidth of a copy of 1 GiB. Random data; the median of
20 after 3.
"""

import json
import re
import statistics
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def timed(run):
    """Milliseconds of a launch."""
    times = []
    for i in range(23):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def dims(operand):
    return [int(n) for n in re.findall(r"\d+", operand.split("[")[1])]


def random(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def product(op, operands):
    """Milliseconds of cuBLAS for `linear`, `linear_dx`, `linear_dw`."""
    a, b = (random(*dims(o)) for o in operands[:2])
    if op == "linear":
        return timed(lambda: a @ b.t())
    if op == "linear_dx":
        return timed(lambda: a @ b)
    return timed(lambda: a.t() @ b)


def attention(op, operands, head):
    """Milliseconds of flash attention, causal, over as many heads as ours of the same width."""
    batch, positions, width = dims(operands[0])
    q, k, v = (random(batch, width // 3 // head, positions, head).requires_grad_() for _ in range(3))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        if op == "attention":
            return timed(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        d = torch.randn_like(o)
        return timed(lambda: torch.autograd.grad(o, (q, k, v), d, retain_graph=True))


def main():
    source, target = (torch.empty(1 << 28, device="cuda").normal_() for _ in range(2))
    copy = 2 * source.nbytes / timed(lambda: target.copy_(source)) / 1e6
    del source, target
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves {copy:.0f} GB/s")
    print(f"{'ours ms':>9} {'peer ms':>9} {'peer/ours':>9}  application")
    for line in open(sys.argv[1]):
        if not line.startswith("{"):
            continue
        row = json.loads(line)
        op, operands, ms = row["op"], row["operands"], row["ms"]
        what = f"{op} {row['case']} {' '.join(operands)}"
        if op in ("linear", "linear_dx", "linear_dw"):
            peer = product(op, operands)
            print(f"{ms:9.4f} {peer:9.4f} {peer / ms:9.2f}  {what}  (cuBLAS)")
        elif op in ("attention", "attention_bwd"):
            peer = attention(op, operands, int(row["case"].split()[-1]))
            print(f"{ms:9.4f} {peer:9.4f} {peer / ms:9.2f}  {what}  (flash, causal)")
        else:
            print(f"{ms:9.4f} {'':>9} {row['gbs'] / copy:9.2f}  {what}  (of the bandwidth of a copy)")


if __name__ == "__main__":
    main()
