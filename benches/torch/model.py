"""The model of the engine as somebody who knows PyTorch would write it for speed: fused qkv and gate_up, SDPA or
FlexAttention, static shapes. Weights come from a Hugging Face folder that the engine exported.

Letters: B rows of the batch, T positions, N = B T, C width, H heads, D head width, V vocabulary, I images, P patches of one.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

TIME_WIDTH = 256


class Sizes:
    """What of config.json the computation needs."""

    def __init__(self, config):
        self.width, self.layers, self.vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
        self.heads = config["num_attention_heads"]
        self.kv_heads = config.get("num_key_value_heads") or self.heads
        self.head = config.get("head_dim") or self.width // self.heads
        self.eps, self.theta = config["rms_norm_eps"], config["rope_theta"]
        self.positions = config["max_position_embeddings"]
        self.tied = config["tie_word_embeddings"]
        own = config.get("transfusion") or {}
        self.qk_norm = own.get("qk_norm", False)
        self.image = own.get("image")
        if self.image:
            self.side, self.channels, self.patch = (self.image[k] for k in ("size", "channels", "patch_size"))
            self.grid = self.side // self.patch
            self.patches = self.grid**2
            self.patch_width = -(-self.patch * self.patch * self.channels // 8) * 8
            self.sine = self.image.get("positions") == "sine2d"


class Layer(nn.Module):
    def __init__(self, s, w):
        super().__init__()
        take = lambda *names: nn.Parameter(torch.cat([w[f"{name}.weight"] for name in names]))
        self.sizes = s
        self.norm_1, self.norm_2 = take("input_layernorm"), take("post_attention_layernorm")
        self.qkv = take("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.out = take("self_attn.o_proj")
        self.gate_up, self.down = take("mlp.gate_proj", "mlp.up_proj"), take("mlp.down_proj")
        if s.qk_norm:
            self.q_norm, self.k_norm = take("self_attn.q_norm"), take("self_attn.k_norm")

    def split(self, x, rotation):
        """q, k, v [B, H, T, D], normalised and rotated."""
        s, (b, t, _) = self.sizes, x.shape
        q, k, v = F.linear(F.rms_norm(x, x.shape[-1:], self.norm_1, s.eps), self.qkv).split(
            [s.heads * s.head, s.kv_heads * s.head, s.kv_heads * s.head], -1
        )
        q, k, v = (y.view(b, t, -1, s.head).transpose(1, 2) for y in (q, k, v))
        if s.qk_norm:
            q, k = F.rms_norm(q, (s.head,), self.q_norm, s.eps), F.rms_norm(k, (s.head,), self.k_norm, s.eps)
        return rotate(q, rotation), rotate(k, rotation), v

    def feed_forward(self, x):
        s = self.sizes
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], self.norm_2, s.eps), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)

    def forward(self, x, rotation, attend):
        q, k, v = self.split(x, rotation)
        heads = attend(q, k, v)
        return self.feed_forward(x + F.linear(heads.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1), self.out))


class Model(nn.Module):
    def __init__(self, config, weights):
        super().__init__()
        self.sizes = s = Sizes(config)
        self.embed = nn.Parameter(weights["model.embed_tokens.weight"].clone())
        self.norm = nn.Parameter(weights["model.norm.weight"].clone())
        self.head = self.embed if s.tied else nn.Parameter(weights["lm_head.weight"].clone())
        prefix = lambda i: f"model.layers.{i}."
        of = lambda p: {name[len(p) :]: w for name, w in weights.items() if name.startswith(p)}
        self.layers = nn.ModuleList(Layer(s, of(prefix(i))) for i in range(s.layers))
        if s.image:
            own = {n.removeprefix("transfusion.").replace(".", "_"): w for n, w in weights.items() if n.startswith("transfusion.")}
            self.codec = nn.ParameterDict({name: nn.Parameter(w.clone()) for name, w in own.items()})
            frequencies = 10000 ** (-torch.arange(TIME_WIDTH // 2, dtype=torch.float64) / (TIME_WIDTH // 2))
            self.register_buffer("times", frequencies.float(), persistent=False)
            self.register_buffer("sines", sine_positions(s.grid, s.width) if s.sine else torch.zeros(0), persistent=False)
        half = s.head // 2
        angle = torch.arange(s.positions + 1)[:, None].double() * s.theta ** (-torch.arange(half).double() / half)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def rotation(self, positions):
        """cos and sin [B, 1, T, D/2] in f32."""
        return self.cos[positions][:, None], self.sin[positions][:, None]

    def embed_images(self, noisy, times):
        """[I, S, S, channels] and [I] -> [I, P, C]."""
        s, w = self.sizes, self.codec
        angle = times[:, None] * self.times
        t = torch.cat([angle.cos(), angle.sin()], -1).to(noisy.dtype)
        t = F.silu(F.linear(t, w["time_in_weight"], w["time_in_bias"]))
        t = F.linear(t, w["time_out_weight"], w["time_out_bias"])
        x = F.linear(patchify(noisy, s) + t[:, None], w["patch_in_weight"], w["patch_in_bias"])
        return x + self.sines.to(x.dtype) if s.sine else x

    def predict(self, h):
        """Rows [I, P, C] -> [I, S, S, channels]."""
        return unpatchify(F.linear(h, self.codec["patch_out_weight"], self.codec["patch_out_bias"]), self.sizes)

    def trunk(self, x, rotation, attend):
        for layer in self.layers:
            x = layer(x, rotation, attend)
        return F.rms_norm(x, x.shape[-1:], self.norm, self.sizes.eps)


def rotate(x, rotation):
    """x [B, H, T, D]; the pair of channel d is channel d + D/2."""
    cos, sin = rotation
    lo, hi = x.float().chunk(2, -1)
    return torch.cat([lo * cos - hi * sin, hi * cos + lo * sin], -1).to(x.dtype)


def patchify(images, s):
    k, n = s.patch, s.grid
    x = images.view(-1, n, k, n, k, s.channels).transpose(2, 3).reshape(-1, n * n, k * k * s.channels)
    return F.pad(x, (0, s.patch_width - x.shape[-1]))


def unpatchify(patches, s):
    k, n = s.patch, s.grid
    x = patches[..., : k * k * s.channels].view(-1, n, n, k, k, s.channels)
    return x.transpose(2, 3).reshape(-1, s.side, s.side, s.channels)


def sine_positions(grid, width):
    quarter = width // 4
    frequency = 10000 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    y, x = (a.reshape(-1, 1) * frequency for a in torch.meshgrid(*[torch.arange(grid).double()] * 2, indexing="ij"))
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], -1).float()
