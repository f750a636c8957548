"""B7: a whole training step of the same model on the same batch: text cross entropy and diffusion loss, clipping, AdamW
(fused), the running means where they are kept.

Variants are words: `eager` or `compiled` (torch.compile), `wrapped` (its C++ wrapper instead of the Python one), `autotuned`
(max-autotune); `flex` (FlexAttention in place of SDPA); `graph` (the whole step as one CUDA graph); `medium` as in
precision.py; in bf16 `autocast` (f32 weights) or `master` (bf16 weights and f32 masters). The trap: every variant is held
against the engine's losses before it is timed, the batch's mask is built inside the step, and the noise is drawn inside the
step, as the engine does both.
"""

import contextlib
import statistics

import torch
import torch.nn.functional as F

import attention
import clock
import precision
import tensors
from model import Model, patchify

CHUNK = 1 << 28  # elements of logits above which cross entropy goes chunk by chunk
FLEX_FROM = 128  # positions: fewer than a block of FlexAttention


class Batch:
    """What a step reads, with the unused ends of its index tensors cut off."""

    def __init__(self, path, device):
        raw = tensors.load(path, device)
        for name in ("text_rows", "targets", "times", "image_weights"):
            if name in raw:
                raw[name] = raw[name].flatten()
        used = raw["row_start"] < raw["row_end"]
        at = torch.arange(used.shape[1], device=device, dtype=torch.int32).expand_as(raw["row_start"])
        # What holds no document sees itself, since a softmax over nothing is not a number; nothing sees it.
        self.row_start = torch.where(used, raw["row_start"], at)
        self.row_end = torch.where(used, raw["row_end"], at + 1)
        self.causal = attention.is_causal(self.row_start, self.row_end)
        self.tokens, self.positions = raw["tokens"].clamp(min=0).long(), raw["positions"].long()
        text = raw["text_rows"] >= 0
        self.text_rows, self.targets = raw["text_rows"][text].long(), raw["targets"][text].long()
        self.text_count = float(raw["text_count"])
        if "images" in raw:
            shown = raw["image_weights"] > 0
            self.images, self.times, self.noise = (raw[name][shown] for name in ("images", "times", "noise"))
            self.coefficients = raw["coefficients"][shown].T[..., None, None, None].contiguous()
            self.image_rows = raw["image_rows"].view(len(shown), -1)[shown].flatten().long()
            self.image_count = float(raw["image_count"])


def cross_entropy(h, head, targets):
    """Sum over rows, in f32."""
    return F.cross_entropy(F.linear(h, head).float(), targets, reduction="sum")


def text_loss(h, head, targets):
    rows = max(1, CHUNK // head.shape[0])
    if len(h) <= rows:
        return cross_entropy(h, head, targets)
    each = zip(h.split(rows), targets.split(rows))
    return sum(torch.utils.checkpoint.checkpoint(cross_entropy, x, head, y, use_reentrant=False) for x, y in each)


def loss_of(model, attend, b, noise):
    """The loss that a step goes down."""
    s, (rows, positions) = model.sizes, b.tokens.shape
    x = F.embedding(b.tokens, model.embed)
    if s.image:
        mix_a, mix_b, mix_c, mix_d = b.coefficients
        noised, target = mix_a * b.images + mix_b * noise, mix_c * b.images + mix_d * noise
        patches = model.embed_images(noised.to(x.dtype), b.times)
        x = x.view(rows * positions, -1).index_copy(0, b.image_rows, patches.flatten(0, 1).to(x.dtype)).view_as(x)
    h = model.trunk(x, model.rotation(b.positions), attend).flatten(0, 1)
    loss = text_loss(h[b.text_rows], model.head, b.targets) / b.text_count
    if s.image:
        drawn = model.predict(h[b.image_rows].view(-1, s.patches, s.width))
        error = (drawn.float() - target).square().mean((1, 2, 3)).sum() / b.image_count
        loss = loss + s.image["lambda"] * error
    return loss


class Step:
    """One variant: a model of its own, its optimiser, and `run`."""

    def __init__(self, words, config, train, weights, batch, device):
        self.words, self.config, self.train, self.weights, self.device = words.split(), config, train, weights, device
        self.batch = batch
        self.grouped = (config.get("num_key_value_heads") or config["num_attention_heads"]) != config["num_attention_heads"]
        self.master = "master" in self.words
        self.compile = self.compiler()
        self.loss = self.compile(loss_of)
        self.attend = self.attention()
        self.build()

    def compiler(self):
        if "eager" in self.words:
            return lambda f: f
        options = {"mode": "max-autotune-no-cudagraphs"} if "autotuned" in self.words else {}
        if "wrapped" in self.words:
            options = {"options": {"cpp_wrapper": True}}
        return lambda f: torch.compile(f, dynamic=False, fullgraph=True, **options)

    def attention(self):
        """From a batch to how it is attended; part of the step."""
        b = self.batch
        keys = b.row_end.shape[1]
        if "flex" in self.words:
            blocks = lambda: attention.block_mask(b.row_start, b.row_end, keys, compiled=True)
            return lambda: attention.flex(blocks(), self.grouped)
        return lambda: attention.sdpa(b.row_start, b.row_end, keys, b.causal, self.grouped)

    def build(self):
        """A model with the exported weights, and its optimiser."""
        bf16 = {name: w.bfloat16() for name, w in self.weights.items()} if self.master else self.weights
        self.model = Model(self.config, bf16).to(self.device)
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float().requires_grad_() for p in self.parameters] if self.master else self.parameters
        t = self.train
        groups = [[], []]
        for p in self.masters:
            groups[p.dim() > 1].append(p)
        groups = [{"params": ps, "weight_decay": d} for ps, d in zip(groups, (0.0, t["weight_decay"]))]
        self.rate = torch.tensor(t["lr"], device=self.device) if "graph" in self.words else t["lr"]
        self.optimiser = torch.optim.AdamW(
            groups, lr=self.rate, betas=(t["beta1"], t["beta2"]), eps=t["eps"], fused=True, capturable="graph" in self.words
        )
        if self.master:
            for m in self.masters:
                m.grad = torch.zeros_like(m)
        self.means = [p.detach().float().clone() for p in self.masters] if t["ema"] > 0 else []
        graph = "graph" in self.words
        self.first = [x.detach().clone() for x in (*self.parameters, *self.masters, *self.means)] if graph else []
        self.replay, self.taken = None, 0

    def set_rate(self, rate):
        for group in self.optimiser.param_groups:
            if torch.is_tensor(group["lr"]):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def forward(self, noise):
        cast = torch.autocast(self.device.split(":")[0], torch.bfloat16) if "autocast" in self.words else contextlib.nullcontext()
        with cast:
            return self.loss(self.model, self.attend(), self.batch, noise)

    def pass_over(self, noise):
        """Loss, gradient, clipping, optimiser, means; the loss and the norm, on the device."""
        loss = self.forward(noise)
        loss.backward()
        if self.master:
            torch._foreach_copy_([m.grad for m in self.masters], [p.grad for p in self.parameters])
        norm = torch.nn.utils.clip_grad_norm_(self.masters, self.train["max_norm"], foreach=True)
        self.optimiser.step()
        if self.master:
            with torch.no_grad():
                torch._foreach_copy_(self.parameters, self.masters)
            for p in self.parameters:
                p.grad = None
        else:
            self.optimiser.zero_grad(set_to_none=True)
        if self.means:
            decay = min(self.train["ema"], (2.0 + self.taken) / (11.0 + self.taken))
            torch._foreach_lerp_(self.means, [m.detach() for m in self.masters], 1 - decay)
        self.taken += 1
        return loss.detach(), norm

    def draw(self):
        """The noise of a timed step."""
        return torch.randn_like(self.batch.images) if self.model.sizes.image else None

    def graphed(self, noise):
        """A step as a CUDA graph, with noise drawn by `noise`; its outputs stay where they are."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.pass_over(noise())
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self.pass_over(noise())

        def replay():
            graph.replay()
            return outputs

        return replay

    @torch.no_grad()
    def rewind(self):
        """Weights, moments and means as `build` left them, in place."""
        for now, then in zip((*self.parameters, *self.masters, *self.means), self.first):
            now.copy_(then)
        for moments in self.optimiser.state.values():
            for value in moments.values():
                value.zero_()
        self.taken = 0

    def run(self):
        """A timed step; the loss arrives on the host, as the engine's does."""
        if self.replay is None:
            graph = "graph" in self.words
            self.replay = self.graphed(self.draw) if graph else lambda: self.pass_over(self.draw())
        return self.replay()[0].item()

    def check(self, rates):
        """Losses and gradient norms of the first steps, with the engine's own noise."""
        given = lambda: getattr(self.batch, "noise", None)
        step = lambda: self.pass_over(given())
        if "graph" in self.words:
            step = self.graphed(given)
            self.rewind()
        told = []
        for rate in rates:
            self.set_rate(rate)
            loss, norm = step()
            told.append((loss.item(), norm.item()))
        self.set_rate(self.train["lr"])
        return told


def variants(device, positions):
    """What might be fastest."""
    if device == "cpu":
        return ["eager", "compiled", "compiled wrapped"]
    plain = ["compiled flex", "compiled flex graph", "autotuned flex graph", "compiled graph"]
    return [v for v in plain if positions >= FLEX_FROM or "flex" not in v]


state = {}


def prepare(config, train, weights, batch, dtype, device, rounded):
    state.clear()
    state.update(config=config, train=train, device=device)
    state["weights"] = {name: w.float() for name, w in tensors.load(weights, device).items()}
    state["batch"] = Batch(batch, device)
    plain = variants(device, state["batch"].tokens.shape[1])
    narrow = [f"{variant} {cast}" for variant in plain for cast in ("autocast", "master")]
    return {"classes": precision.classes(plain, narrow, dtype, rounded)}


def build(variant, rates):
    """Builds a variant and takes its first steps."""
    of = state
    precision.use(variant.split())
    state["step"] = step = Step(variant, of["config"], of["train"], of["weights"], of["batch"], of["device"])
    told = step.check(rates)
    return {"losses": [loss for loss, _ in told], "norms": [norm for _, norm in told]}


def time(seconds):
    """Times the variant that was built last."""
    step = state["step"]
    return {"ms": clock.block(step.run, seconds, state["device"])}


def memory():
    """Bytes at the peak on a GPU."""
    return {"bytes": torch.cuda.max_memory_allocated() if state["device"] != "cpu" else None}


HANDLERS = {"prepare": prepare, "build": build, "time": time, "memory": memory}
