"""B9: sampling with a static cache: text, one greedy token of every sequence at a time, and guided denoising of images.

Variants are words as in step.py; `graph` replays one CUDA graph for every token or denoising step, `bf16` stores weights and
cache in it. The traps: logits, or the prediction and the next image, are held against the engine's first; every token reaches
the host, since somebody reads it; the noise level and the coefficients of a denoising step are tensors, so that one graph
serves all of them.
"""

import time

import torch
import torch.nn.functional as F

import attention
import clock
import precision
import tensors
from model import Model, rotate


class Cached:
    """A model and a cache for keys and values, [rows, Hkv, length, D] a layer."""

    def __init__(self, model, rows, length, device):
        s = model.sizes
        self.model, self.rows, self.length, self.device = model, rows, length, device
        make = lambda: torch.zeros(rows, s.kv_heads, length, s.head, dtype=model.embed.dtype, device=device)
        self.keys, self.values = [make() for _ in model.layers], [make() for _ in model.layers]
        self.grouped = s.kv_heads != s.heads

    def extend(self, x, positions, at, mask, until=None):
        """Rows x [B, T, C] at positions [B, T] go to the places `at` [T] of the cache; what they see is `mask`
        [B or 1, 1, T, length], or everything before `until`."""
        rotation = self.model.rotation(positions)
        for layer, keys, values in zip(self.model.layers, self.keys, self.values):
            q, k, v = layer.split(x, rotation)
            keys.index_copy_(2, at, k)
            values.index_copy_(2, at, v)
            seen = (keys, values) if until is None else (keys[:, :, :until], values[:, :, :until])
            heads = F.scaled_dot_product_attention(q, *seen, attn_mask=mask, enable_gqa=self.grouped)
            x = layer.feed_forward(x + F.linear(heads.transpose(1, 2).reshape(*x.shape[:2], -1), layer.out))
        return F.rms_norm(x, x.shape[-1:], self.model.norm, self.model.sizes.eps)


def compiler(words):
    if "eager" in words:
        return lambda f: f
    options = {"options": {"cpp_wrapper": True}} if "wrapped" in words else {}
    return lambda f: torch.compile(f, dynamic=False, fullgraph=True, **options)


def graphed(run):
    """`run` without arguments as a CUDA graph; its outputs stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay():
        graph.replay()
        return out

    return replay


class Decoder:
    """Greedy text: `run` decodes so many tokens behind the prompts."""

    def __init__(self, words, model, prompts, length, device):
        self.words, self.device, self.prompts = words.split(), device, prompts
        self.cache = Cached(model, len(prompts), length, device)
        self.places = torch.arange(length, device=device)
        self.tokens = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.next = compiler(self.words)(self.sliced if "eager" in self.words else self.masked)
        self.replay = None

    def logits(self, x):
        return F.linear(x[:, -1], self.cache.model.head).float()

    def masked(self, tokens, at):
        """The next token of every sequence by static shapes; `at` moves on by one."""
        cache = self.cache
        mask = (self.places <= at)[None, None, None]
        x = F.embedding(tokens, cache.model.embed)[:, None]
        logits = self.logits(cache.extend(x, at.expand(cache.rows, 1), at, mask))
        return logits, logits.argmax(-1)

    def sliced(self, tokens, at):
        """The same by a cache that is cut where it ends."""
        cache, end = self.cache, self.length + 1
        x = F.embedding(tokens, cache.model.embed)[:, None]
        logits = self.logits(cache.extend(x, at.expand(cache.rows, 1), at, None, until=end))
        return logits, logits.argmax(-1)

    def step(self):
        logits, chosen = self.next(self.tokens, self.at)
        self.tokens.copy_(chosen)
        self.at.add_(1)
        return logits, chosen

    def prefill(self, upto=None):
        """The prompts, or what they begin with, into the cache."""
        model, t = self.cache.model, upto or self.prompts.shape[1]
        at = torch.arange(t, device=self.device)
        mask = (self.places <= at[:, None])[None, None]
        self.cache.extend(F.embedding(self.prompts[:, :t], model.embed), at.expand(self.cache.rows, t), at, mask)
        self.length = t
        self.at.fill_(t)

    def ready(self, token, upto=None):
        """What decodes a token; the prompts are cached, and `token` comes next."""
        if "graph" in self.words and self.replay is None:
            self.prefill(1)
            self.replay = graphed(self.step)
        self.prefill(upto)
        self.tokens.fill_(token)
        return self.replay or self.step

    @torch.no_grad()
    def check(self, token):
        """Logits [B V] behind one token after the prompts."""
        return self.ready(token)()[0].flatten().tolist()

    @torch.no_grad()
    def run(self, prompt, count):
        """Milliseconds of each of so many tokens behind a prompt."""
        step = self.ready(ord("e"), prompt)
        clock.wait(self.device)
        start = time.perf_counter()
        for _ in range(count):
            step()[1].tolist()
            self.length += 1
        return 1e3 * (time.perf_counter() - start) / count


class Denoiser:
    """Guided denoising: images [B, S, S, channels] with rows [2 B], those without the condition last."""

    def __init__(self, words, model, contexts, steps, noise, device):
        self.words, self.device, self.noise, self.model = words.split(), device, noise, model
        s, rows = model.sizes, len(contexts)
        longest = max(map(len, contexts))
        # The image comes first in the cache and its context behind it: attention asks for no order.
        self.cache = Cached(model, rows, s.patches + longest, device)
        tokens = torch.tensor([c + [0] * (longest - len(c)) for c in contexts], device=device)
        lengths = torch.tensor([len(c) for c in contexts], device=device)
        place = torch.arange(longest, device=device)
        causal = (place[None, :] <= place[:, None]).expand(rows, longest, longest)
        nothing = torch.zeros(rows, longest, s.patches, dtype=torch.bool, device=device)
        with torch.no_grad():
            x = F.embedding(tokens, model.embed)
            mask = torch.cat([nothing, causal], -1)[:, None]
            self.cache.extend(x, place.expand(rows, longest), place + s.patches, mask)
        own = torch.ones(rows, s.patches, dtype=torch.bool, device=device)
        self.mask = torch.cat([own, place < lengths[:, None]], -1)[:, None, None].expand(-1, -1, s.patches, -1).contiguous()
        self.at = torch.arange(s.patches, device=device)
        self.positions = lengths[:, None] + self.at
        self.steps = [(torch.full((rows // 2,), t, device=device), torch.tensor(row, device=device)) for t, row in steps]
        self.x, self.t, self.row = noise.clone(), self.steps[0][0].clone(), self.steps[0][1].clone()
        self.next = compiler(self.words)(self.step)
        self.replay = None

    def step(self, x, t, row):
        """The next images."""
        model = self.model
        embedded = model.embed_images(x.to(model.embed.dtype), t)
        h = self.cache.extend(torch.cat([embedded, embedded]), self.positions, self.at, self.mask)
        p = model.predict(h).float()
        with_, without = p.chunk(2)
        guided = without + row[5] * (with_ - without)
        clean = (row[0] * x + row[1] * guided).clamp(-row[4], row[4])
        noise = (x - row[2] * clean) / row[3]
        return row[6] * clean + row[7] * noise + row[8] * x

    def advance(self):
        self.x.copy_(self.next(self.x, self.t, self.row))

    def ready(self):
        """What takes a step."""
        if "graph" in self.words and self.replay is None:
            self.replay = graphed(self.advance)
        return self.replay or self.advance

    @torch.no_grad()
    def check(self, t, row):
        """The images that follow noise."""
        step = self.ready()
        self.x.copy_(self.noise)
        self.t.fill_(t)
        self.row.copy_(torch.tensor(row, device=self.device))
        step()
        return {"x": self.x.flatten().tolist()}

    @torch.no_grad()
    def run(self):
        """Milliseconds of a step, over a whole picture."""
        step = self.ready()
        clock.wait(self.device)
        start = time.perf_counter()
        self.x.copy_(self.noise)
        for t, row in self.steps:
            self.t.copy_(t)
            self.row.copy_(row)
            step()
        self.x.cpu()
        return 1e3 * (time.perf_counter() - start) / len(self.steps)


def variants(device):
    return ["eager", "compiled", "compiled wrapped"] if device == "cpu" else ["eager", "compiled", "compiled graph"]


state = {}


def prepare(config, weights, dtype, device, rounded):
    state.clear()
    state.update(device=device, config=config, weights=tensors.load(weights, device))
    plain = variants(device)
    return {"classes": precision.classes(plain, [f"{name} bf16" for name in plain], dtype, rounded)}


def model(variant):
    """The weights as a variant stores them, which computes as it is allowed to from now on."""
    words = variant.split()
    precision.use(words)
    to = torch.bfloat16 if "bf16" in words else torch.float32
    weights = {name: w.to(to) for name, w in state["weights"].items()}
    return Model(state["config"], weights).to(state["device"]).requires_grad_(False)


def decode(variant, prompts, token, length):
    """Builds a decoder; its logits behind `token`."""
    prompts = torch.tensor(prompts, device=state["device"])
    state["decoder"] = d = Decoder(variant, model(variant), prompts, length, state["device"])
    return {"logits": d.check(token)}


def denoise(variant, contexts, steps, noise, t, row):
    """Builds a denoiser; the images that follow noise at `t`."""
    m = model(variant)
    s = m.sizes
    noise = tensors.load(noise, state["device"])["noise"].reshape(-1, s.side, s.side, s.channels)
    state["denoiser"] = d = Denoiser(variant, m, contexts, steps, noise, state["device"])
    return d.check(t, row)


def repeated(run, seconds):
    times, end = [], time.perf_counter() + seconds
    while not times or time.perf_counter() < end:
        times.append(run())
    return {"ms": times}


HANDLERS = {
    "prepare": prepare,
    "decode": decode,
    "denoise": denoise,
    "time_decode": lambda prompt, count, seconds: repeated(lambda: state["decoder"].run(prompt, count), seconds),
    "time_denoise": lambda seconds: repeated(lambda: state["denoiser"].run(), seconds),
}
