"""The Transfusion model and loss in plain PyTorch, written from the recipe and not from the engine.

    python transfusion_reference.py write     # tests/golden/transfusion.safetensors, computed in f64
    python transfusion_reference.py compare   # the same in f32 beside the golden: what plain f32 rounding costs

Letters: B rows of the batch, T positions, C width, H heads, D head width, V vocabulary, I picture slots, P patches of a
picture, Z values of a patch (k k channels, padded with zeros to a multiple of 8).
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file

from golden_batch import TIME_WIDTH, variants

GOLDEN = Path(__file__).parent.parent / "golden" / "transfusion.safetensors"


def rms_norm(x, w, eps):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w


def rope(x, positions, theta):
    """x [B, T, H, D]; the pair of channel d is channel d + D/2."""
    half = x.shape[-1] // 2
    angle = positions[..., None].double() * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype)[:, :, None], angle.sin().to(x.dtype)[:, :, None]
    lo, hi = x[..., :half], x[..., half:]
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1)


def attention(w, cfg, x, batch):
    """Query i sees the keys row_start[i] <= j < row_end[i] of its row; a query that sees none gives zero."""
    b, t, _ = x.shape
    eps, d, own = cfg["rms_norm_eps"], cfg["head_dim"], cfg["transfusion"]
    q, k, v = ((x @ w(f"self_attn.{n}_proj.weight").T).view(b, t, -1, d) for n in "qkv")
    if own["qk_norm"]:
        q, k = rms_norm(q, w("self_attn.q_norm.weight"), eps), rms_norm(k, w("self_attn.k_norm.weight"), eps)
    q, k = (rope(y, batch["positions"], cfg["rope_theta"]) for y in (q, k))
    group = cfg["num_attention_heads"] // cfg["num_key_value_heads"]
    k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    key = torch.arange(t)
    sees = ((key >= batch["row_start"][..., None]) & (key < batch["row_end"][..., None]))[:, None]
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(d)
    p = scores.masked_fill(~sees, -1e30).softmax(-1) * sees
    return torch.einsum("bhij,bjhd->bihd", p, v).reshape(b, t, -1) @ w("self_attn.o_proj.weight").T


def trunk(params, cfg, x, batch):
    """x [B, T, C] -> hidden states after the final norm."""
    eps = cfg["rms_norm_eps"]
    for i in range(cfg["num_hidden_layers"]):
        w = lambda name: params[f"model.layers.{i}.{name}"]
        x = x + attention(w, cfg, rms_norm(x, w("input_layernorm.weight"), eps), batch)
        y = rms_norm(x, w("post_attention_layernorm.weight"), eps)
        gated = F.silu(y @ w("mlp.gate_proj.weight").T) * (y @ w("mlp.up_proj.weight").T)
        x = x + gated @ w("mlp.down_proj.weight").T
    return rms_norm(x, params["model.norm.weight"], eps)


def patchify(pictures, k, z):
    """[I, H, W, ch] -> [I, P, Z]: patches in raster order, element (dy k + dx) ch + c, zeros up to Z."""
    i, h, w, ch = pictures.shape
    x = pictures.view(i, h // k, k, w // k, k, ch).transpose(2, 3).reshape(i, -1, k * k * ch)
    return F.pad(x, (0, z - k * k * ch))


def unpatchify(patches, k, size, ch):
    i, n = len(patches), size // k
    return patches[..., : k * k * ch].view(i, n, n, k, k, ch).transpose(2, 3).reshape(i, size, size, ch)


def time_embedding(times, dtype):
    """Angles in f64: in f32 an angle of several hundred radians would already cost 5e-5."""
    half = TIME_WIDTH // 2
    angle = times.double()[:, None] * 10000 ** (-torch.arange(half, dtype=torch.float64) / half)
    return torch.cat([angle.cos(), angle.sin()], -1).to(dtype)


def sine_positions(side, width, dtype):
    quarter = width // 4
    frequency = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = (a.reshape(-1, 1) * frequency for a in torch.meshgrid(*[torch.arange(side).double()] * 2, indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], -1).to(dtype)


def project(params, name, x):
    return F.linear(x, params[f"transfusion.{name}.weight"], params[f"transfusion.{name}.bias"])


def embed_pictures(params, cfg, noisy, times):
    own = cfg["transfusion"]
    t = project(params, "time_out", F.silu(project(params, "time_in", time_embedding(times, noisy.dtype))))
    x = project(params, "patch_in", patchify(noisy, own["patch_size"], own["patch_width"]) + t[:, None])
    if own["patch_positions"] == "sine2d":
        x = x + sine_positions(own["image_size"] // own["patch_size"], x.shape[-1], x.dtype)
    return x


def loss(params, cfg, batch):
    """Every quantity of the loss by name; -1 marks what is unused in tokens, text_rows, targets and image_rows."""
    own, dtype = cfg["transfusion"], params["model.norm.weight"].dtype
    a, b, c, d = batch["coefficients"].to(dtype).T[:, :, None, None, None]
    images, noise = batch["images"].to(dtype), batch["noise"].to(dtype)
    tokens = batch["tokens"]
    x = F.embedding(tokens.clamp(min=0), params["model.embed_tokens.weight"]) * (tokens >= 0)[..., None]
    used = batch["image_rows"] >= 0
    patches = embed_pictures(params, cfg, a * images + b * noise, batch["times"])
    rows = x.flatten(0, 1).index_put((batch["image_rows"][used],), patches[used])
    hidden = trunk(params, cfg, rows.view_as(x), batch).flatten(0, 1)

    text = batch["text_rows"] >= 0
    head = params["model.embed_tokens.weight" if cfg["tie_word_embeddings"] else "lm_head.weight"]
    logits = hidden[batch["text_rows"][text]] @ head.T
    loss_text = F.cross_entropy(logits, batch["targets"][text], reduction="sum") / batch["count_text"].to(dtype)

    out = project(params, "patch_out", hidden[batch["image_rows"].clamp(min=0)])
    prediction = unpatchify(out, own["patch_size"], own["image_size"], own["channels"])
    prediction = prediction * used.all(1)[:, None, None, None]
    mse = (prediction - (c * images + d * noise)).pow(2).mean((1, 2, 3)) * used.all(1)
    loss_image = (batch["image_weights"].to(dtype) * mse).sum() / batch["count_images"].to(dtype)
    total = loss_text + own["lambda"] * loss_image
    return {"loss": total, "loss_text": loss_text, "loss_image": loss_image, "image_mse": mse, "prediction": prediction}


def evaluate(dtype):
    """Every golden tensor as `<variant>.<group>.<name>`, and the metadata with the configurations."""
    tensors, configs = {}, {}
    for name, cfg, params, batch in variants():
        leaves = {key: p.to(dtype).requires_grad_() for key, p in params.items()}
        results = loss(leaves, cfg, batch)
        results["loss"].backward()
        configs[name] = cfg
        groups = {"param": params, "input": batch, "output": results, "grad": {k: p.grad for k, p in leaves.items()}}
        for group, items in groups.items():
            for key, x in items.items():
                stored = x.detach().to(torch.float32 if x.is_floating_point() else torch.int32)
                tensors[f"{name}.{group}.{key}"] = stored.reshape(x.shape or (1,)).contiguous()
    return tensors, {"configs": json.dumps(configs)}  # one entry: several would be written in no fixed order


def compare():
    tensors, _ = evaluate(torch.float32)
    with safe_open(GOLDEN, "pt") as golden:
        expected = {name: golden.get_tensor(name).double() for name in golden.keys()}
    apart = {n: float((tensors[n].double() - e).norm() / e.norm().clamp(min=1e-30)) for n, e in expected.items()}
    print("norm of the difference over the norm, the worst eight")
    for name, value in sorted(apart.items(), key=lambda pair: -pair[1])[:8]:
        print(f"{value:.2e}  {name}")


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("mode", choices=["write", "compare"])
    mode = cli.parse_args().mode
    torch.set_num_threads(1)
    if mode == "compare":
        return compare()
    tensors, metadata = evaluate(torch.float64)
    save_file(tensors, GOLDEN, metadata=metadata)


if __name__ == "__main__":
    main()
