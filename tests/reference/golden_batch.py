"""The inputs of the golden file: two small models and a packed batch for each.

Documents of every kind, packed into two rows: caption first, picture first, text only, a dropped condition, text around
a picture. One picture slot, some text rows and the end of each row are unused.
"""

import math

import torch

from schedule_reference import coefficients

TIME_WIDTH = 256


def config(vocab, width, heads, kv_heads, hidden, tied, qk_norm, picture, patch, positions):
    """Hugging Face Llama keys and our own block."""
    return {
        "model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": hidden,
        "num_hidden_layers": 2, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": width // heads, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": tied,
        "transfusion": {
            "image_size": picture, "channels": 3, "patch_size": patch, "patch_width": -(-patch * patch * 3 // 8) * 8,
            "patch_positions": positions, "qk_norm": qk_norm, "lambda": 5.0,
        },
    }  # fmt: skip


def shapes(cfg):
    """External name -> shape of every parameter."""
    c, v, f, d = cfg["hidden_size"], cfg["vocab_size"], cfg["intermediate_size"], cfg["head_dim"]
    q, kv, z = cfg["num_attention_heads"] * d, cfg["num_key_value_heads"] * d, cfg["transfusion"]["patch_width"]
    layer = {
        "input_layernorm": (c,), "self_attn.q_proj": (q, c), "self_attn.k_proj": (kv, c), "self_attn.v_proj": (kv, c),
        "self_attn.o_proj": (c, q), "post_attention_layernorm": (c,), "mlp.gate_proj": (f, c), "mlp.up_proj": (f, c),
        "mlp.down_proj": (c, f),
    }  # fmt: skip
    if cfg["transfusion"]["qk_norm"]:
        layer |= {"self_attn.q_norm": (d,), "self_attn.k_norm": (d,)}
    names = {"model.embed_tokens.weight": (v, c), "model.norm.weight": (c,)}
    for i in range(cfg["num_hidden_layers"]):
        names |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    if not cfg["tie_word_embeddings"]:
        names["lm_head.weight"] = (v, c)
    codec = {"time_in": (z, TIME_WIDTH), "time_out": (z, z), "patch_in": (c, z), "patch_out": (z, c)}
    for name, (rows, columns) in codec.items():
        names |= {f"transfusion.{name}.weight": (rows, columns), f"transfusion.{name}.bias": (rows,)}
    return names


def special_ids(vocab):
    """BOS, EOS, BOI, EOI, PAD: the layout of the byte vocabulary, moved to the end of a smaller one."""
    return range(vocab - 8, vocab - 3)


def documents(vocab):
    """Two rows of documents, each a list of ids with "image" for a picture; the flag says whether its text is trained."""
    bos, eos, boi, eoi, _ = special_ids(vocab)
    picture = [boi, "image", eoi]
    caption_first, image_first = [bos, 5, 9, 3, 9, *picture, eos], [bos, *picture, 7, 1, 30, eos]
    dropped, interleaved = [bos, *picture, eos], [bos, 11, 2, *picture, 40, 7, eos]
    return [
        [(caption_first, True), (image_first, True), ([bos, 17, 4, eos], True)],
        [(dropped, False), (interleaved, True), ([bos, 0, 22, 8, 63, 22, eos], True)],
    ]


def pack(cfg, length, spare_text):
    """The packed rows and the index tensors; row 0 ends in tokens of -1, row 1 in PAD, and both ends see nothing."""
    _, _, boi, eoi, pad = special_ids(cfg["vocab_size"])
    own = cfg["transfusion"]
    patches = (own["image_size"] // own["patch_size"]) ** 2
    columns = {"tokens": [], "positions": [], "row_start": [], "row_end": []}
    text_rows, targets, image_rows = [], [], []
    for r, row in enumerate(documents(cfg["vocab_size"])):
        cells = []  # (token, position, row_start, row_end)
        for ids, trained in row:
            first = len(cells)
            for here, following in zip(ids, [*ids[1:], "end"]):
                at = len(cells)
                if here == "image":
                    image_rows.append([r * length + at + p for p in range(patches)])
                    cells += [(-1, at + p - first, first, at + patches) for p in range(patches)]
                    continue
                cells.append((here, at - first, first, at + 1))
                if trained and here != boi and following not in ("image", "end", eoi):
                    text_rows.append(r * length + at)
                    targets.append(following)
        cells += [([-1, pad][r], 0, len(cells), len(cells))] * (length - len(cells))
        for column, values in zip(columns.values(), zip(*cells)):
            column.append(values)
    columns |= {
        "text_rows": text_rows + [-1] * spare_text,
        "targets": targets + [-1] * spare_text,
        "image_rows": [*image_rows[:2], [-1] * patches, *image_rows[2:]],
    }
    return {name: torch.tensor(values) for name, values in columns.items()}


# One entry per picture slot: the objective and the time; slot 1 is the picture that precedes its caption, slot 2 is unused.
NOISING = {
    "a": [("epsilon", 700.5), ("x0", 250.0), ("v", 1.0), ("epsilon", 12.0), ("v", 999.0)],
    "b": [("flow", 430.25), ("flow", 0.0), ("flow", 5.0), ("v", 881.0), ("epsilon", 1000.0)],
}


def parameters(cfg, normal):
    """Large enough that attention is far from uniform and no gradient is small by accident."""
    for name, shape in shapes(cfg).items():
        scale = 0.1 if len(shape) == 1 else 0.4 if "embed" in name else 1 / math.sqrt(shape[1])
        yield name, (("norm" in name) + scale * normal(*shape)).float()


def pictures(cfg, noising, normal):
    size = cfg["transfusion"]["image_size"]
    shape = (len(noising), size, size, cfg["transfusion"]["channels"])
    return {
        "images": torch.tanh(normal(*shape)).float(),
        "noise": normal(*shape).float(),
        "times": torch.tensor([t for _, t in noising]),
        "coefficients": torch.tensor([coefficients(objective, t) for objective, t in noising]),
    }


def variants():
    """(name, configuration, parameters, batch) of each; every float is exact in f32.

    In "a" the losses are averaged over the counts of a larger step, as when gradients accumulate; in "b" over its own.
    """
    configs = {
        "a": config(72, 32, 4, 2, 48, True, True, 8, 2, "sine2d"),
        "b": config(72, 16, 2, 2, 24, False, False, 4, 1, "none"),
    }
    for seed, (name, cfg) in enumerate(configs.items()):
        generator = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
        params = dict(parameters(cfg, normal))
        batch = pack(cfg, 56, 4) | pictures(cfg, NOISING[name], normal)
        used = float((batch["text_rows"] >= 0).sum())
        batch["image_weights"] = torch.tensor([1.0, 0.7, 0.0, 1.0, 2.5] if name == "a" else [1.0, 1.0, 0.0, 1.0, 1.0])
        batch["count_text"] = torch.tensor([2 * used - 1 if name == "a" else used])
        batch["count_images"] = torch.tensor([7.0 if name == "a" else 4.0])
        yield name, cfg, params, batch
