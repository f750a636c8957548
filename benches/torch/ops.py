"""B1 to B6, B8 and B10: single operations on the very numbers that the engine's had, in the layout that PyTorch likes best.

What is only rearranged is rearranged before the clock runs. A variant is held against the engine's results; a `bound` solves
another problem than the engine (a causal mask in place of the batch's own) and is timed for comparison only.
"""

import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import attention as masks
import clock
import precision
import tensors
from model import rotate

PEERS = {}


def peer(*variants):
    """Registers how an op is done: from settings and operands to what is timed and, of its result, outputs by place."""
    return lambda f: PEERS.setdefault(f.__name__, (variants, f))


class Task:
    """What is timed, how outputs follow from what it returns, and how to begin anew where it works in place."""

    def __init__(self, run, outs, compiles=True, again=lambda: None):
        self.run, self.outs, self.compiles, self.again = run, outs, compiles, again


def settings(text):
    """`QkNorm { heads: Heads { heads: 4, width: 32 }, eps: 1e-5 }` -> names and values; the innermost of a name counts."""
    return SimpleNamespace(**dict(re.findall(r"(\w+): ([\w.+-]+)", text)))


def halves(w):
    """Rows that are gate and up in turn -> all gates, then all ups."""
    return torch.cat([w[0::2], w[1::2]])


def unzip(x):
    """Columns in pairs -> first ones, then second ones."""
    return torch.cat([x[..., 0::2], x[..., 1::2]], -1)


def zipped(x):
    return torch.stack(x.chunk(2, -1), -1).flatten(-2)


ROWS = ("eager", "compiled")
PRODUCTS = ("linear", "linear_dx", "linear_dw", "cross_entropy", "cross_entropy_bwd")


@peer("eager")
def linear(s, t):
    bias = t[2] if s.bias == "true" else None
    if s.rotary == "Some":
        by, w = rotation(s, t[-1], 1.0), in_halves(t[1].t(), s).t().contiguous()
        bias = None if bias is None else in_halves(bias, s)

        def turning(x):
            q, k, v = split(F.linear(x, w, bias), s)
            return rotate(q, by), rotate(k, by), v

        return Task(lambda: turning(t[0]), lambda y: {0: torch.cat([zipped(y[0]), zipped(y[1]), y[2]], -2).flatten(-2)})
    residual = t[-1] if s.residual == "true" else None
    if s.activation == "SwiGlu":
        w = halves(t[1])

        def run(x):
            gate, up = F.linear(x, w).chunk(2, -1)
            return F.silu(gate) * up
    elif s.activation == "Silu":
        run = lambda x: F.silu(F.linear(x, t[1], bias))
    elif residual is not None:
        run = lambda x: residual + F.linear(x, t[1], bias)
    else:
        run = lambda x: F.linear(x, t[1], bias)
    return Task(lambda: run(t[0]), lambda y: {0: y})


@peer("eager")
def linear_dx(s, t):
    if s.gated != "true":
        return Task(lambda: t[0] @ t[1], lambda dx: {0: dx})
    gate, up = (x.contiguous() for x in unzip(t[2]).chunk(2, -1))

    def run():
        dy = t[0] @ t[1]
        return torch.ops.aten.silu_backward(dy * up, gate), dy * F.silu(gate)

    return Task(run, lambda d: {0: zipped(torch.cat(d, -1))})


@peer("eager")
def linear_dw(s, t):
    before = t[2] if s.sum == "Added" else 0.0
    return Task(lambda: t[0].t() @ t[1], lambda dw: {0: before + dw})


def gradient(forward, leaves, d, outs):
    """The backward pass of `forward` alone."""
    leaves = [x.detach().requires_grad_() for x in leaves]

    def task(compiled):
        y = compiled(forward)(*leaves)
        return lambda: torch.autograd.grad(y, leaves, d, retain_graph=True)

    t = Task(None, outs)
    t.backward = task
    return t


@peer(*ROWS)
def rmsnorm(s, t):
    x, w = t
    return Task(lambda: F.rms_norm(x, w.shape, w, float(s.eps)), lambda y: {0: y})


@peer(*ROWS)
def rmsnorm_bwd(s, t):
    x, w, _, dy, *before = t
    norm = lambda x, w: F.rms_norm(x, w.shape, w, 1e-5)
    of, d = norm, dy
    if s.arrived == "true":
        of, d = lambda x, w: (norm(x, w), x), (dy, before.pop(0))
    return gradient(of, [x, w], d, lambda g: {0: g[0], 1: g[1] + (before[0] if s.sum == "Added" else 0.0)})


def split(qkv, s):
    heads, kv, d = int(s.heads), int(s.kv_heads), int(s.width)
    return [y.unflatten(-1, (-1, d)) for y in qkv.split([heads * d, kv * d, kv * d], -1)]


def in_halves(qkv, s):
    """Packed rows whose q and k heads have first ones of pairs, then second ones."""
    q, k, v = split(qkv, s)
    return torch.cat([unzip(q), unzip(k), v], -2).flatten(-2)


@peer(*ROWS)
def qk_norm(s, t):
    q, k, v = split(t[0], s)
    eps = float(s.eps)
    run = lambda: (F.rms_norm(q, t[1].shape, t[1], eps), F.rms_norm(k, t[2].shape, t[2], eps))
    return Task(run, lambda y: {0: torch.cat([*y, v], -2).flatten(-2)})


@peer(*ROWS)
def qk_norm_bwd(s, t):
    q, k, _ = split(t[0], s)
    dq, dk, dv = split(t[3], s)
    eps = float(s.eps)
    before = t[4:] if s.sum == "Added" else [0.0, 0.0]
    norm = lambda q, k, wq, wk: (F.rms_norm(q, wq.shape, wq, eps), F.rms_norm(k, wk.shape, wk, eps))
    outs = lambda g: {0: torch.cat([g[0], g[1], dv], -2).flatten(-2), 1: g[2] + before[0], 2: g[3] + before[1]}
    return gradient(norm, [q, k, t[1], t[2]], (dq, dk), outs)


def rotation(s, positions, sign):
    """Cosines and sines of the pairs of every row, those of every layer of a step; rows that are unused do not turn."""
    half = int(s.width) // 2
    pace = float(s.theta) ** (-torch.arange(half, device=positions.device).double() / half)
    angle = positions.clamp(min=0).double()[:, None] * pace
    return angle.cos().float()[:, None], sign * angle.sin().float()[:, None]


def rope_by(s, t, sign):
    q, k, v = split(t[0], s)
    by, q, k = rotation(s, t[1], sign), unzip(q), unzip(k)
    outs = lambda y: {0: torch.cat([zipped(y[0]), zipped(y[1]), v], -2).flatten(-2)}
    return Task(lambda: (rotate(q, by), rotate(k, by)), outs)


@peer(*ROWS)
def rope(s, t):
    return rope_by(s, t, 1.0)


@peer(*ROWS)
def rope_bwd(s, t):
    return rope_by(s, t, -1.0)


@peer(*ROWS)
def swiglu(s, t):
    x = unzip(t[0])

    def run():
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return Task(run, lambda y: {0: y})


@peer(*ROWS)
def swiglu_bwd(s, t):
    def gated(x):
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return gradient(gated, [unzip(t[0])], t[1], lambda g: {0: zipped(g[0])})


@peer(*ROWS)
def silu_bwd(s, t):
    return gradient(F.silu, [t[0]], t[1], lambda g: {0: g[0]})


@peer(*ROWS)
def add(s, t):
    a, b = t
    if s.repeat.startswith("Each"):
        b = b.repeat_interleave(len(a) // len(b), 0)
    scale = float(s.scale)
    if s.repeat == "Tile":
        return Task(lambda: torch.add(a.unflatten(0, (-1, len(b))), b, alpha=scale), lambda y: {0: y.flatten(0, 1)})
    return Task(lambda: torch.add(a, b, alpha=scale), lambda y: {0: y})


def chosen(index, *rows):
    """Indices that name a row, and what belongs to them."""
    used = index >= 0
    return index[used].long(), *[r[used] for r in rows]


@peer("eager")
def gather_rows(s, t):
    index, used = t[1].flatten().clamp(min=0).long(), (t[1].flatten() >= 0)[:, None]
    return Task(lambda: F.embedding(index, t[0]), lambda y: {0: y * used})


@peer("eager")
def gather_rows_bwd(s, t):
    index, dy = chosen(t[1].flatten(), t[0])
    rows = int(re.search(r"x: \w+\[(\d+)", s.text)[1])
    before = t[2] if s.sum == "Added" else 0.0
    run = lambda: torch.zeros(rows, dy.shape[1], dtype=dy.dtype, device=dy.device).index_add_(0, index, dy)
    return Task(run, lambda dx: {0: before + dx})


@peer("eager")
def scatter_rows(s, t):
    index, rows = chosen(t[2].flatten(), t[1])
    base = t[0].clone()
    return Task(lambda: base.index_copy_(0, index, rows), lambda y: {0: y})


@peer(*ROWS)
def cross_entropy(s, t):
    h, head, targets, count = t
    targets = targets.flatten().long()
    run = lambda: F.cross_entropy(F.linear(h, head).float(), targets, ignore_index=-1, reduction="sum") / count
    return Task(run, lambda loss: {0: loss})


@peer(*ROWS)
def cross_entropy_bwd(s, t):
    h, head, targets, count, _, dloss, *before = t
    targets = targets.flatten().long()
    loss = lambda h, head: F.cross_entropy(F.linear(h, head).float(), targets, ignore_index=-1, reduction="sum") / count
    outs = lambda g: {0: g[0], 1: g[1] + (before[0] if s.sum == "Added" else 0.0)}
    return gradient(loss, [h, head], dloss, outs)


@peer("fused")
def adamw(s, t):
    each = int(s.states)
    master = each == 4
    *states, schedule, scale = t
    own = [states[at : at + each + 1] for at in range(0, len(states), each + 1)]
    lr, first = float(schedule[0]), float(schedule[1])
    beta1, beta2 = float(s.beta1), float(s.beta2)
    done = round(torch.tensor(1 - first).log().item() / torch.tensor(beta1).log().item()) - 1
    moved = 3 if master else 0
    starts = [x[moved].float() for x in own]
    params = [start.clone().requires_grad_() for start in starts]
    for p, x in zip(params, own):
        p.grad = x[each].float() * scale
    optimiser = torch.optim.AdamW(params, lr=lr, betas=(beta1, beta2), eps=float(s.eps), weight_decay=float(s.weight_decay), fused=True)
    for p, x in zip(params, own):
        step = torch.tensor(float(done), device=p.device)
        optimiser.state[p] = {"step": step, "exp_avg": x[1].float().clone(), "exp_avg_sq": x[2].float().clone()}

    def again():
        with torch.no_grad():
            for p, start, x in zip(params, starts, own):
                state = optimiser.state[p]
                p.copy_(start), state["exp_avg"].copy_(x[1]), state["exp_avg_sq"].copy_(x[2]), state["step"].fill_(done)

    def outs(_):
        of = lambda p: {moved: p.detach(), 1: optimiser.state[p]["exp_avg"], 2: optimiser.state[p]["exp_avg_sq"]}
        return {each * i + k: x for i, p in enumerate(params) for k, x in of(p).items()}

    return Task(optimiser.step, outs, compiles=False, again=again)


@peer("eager")
def ema(s, t):
    *pairs, decay, scale = t
    means, news, share = [m.clone() for m in pairs[0::2]], pairs[1::2], 1 - float(decay)
    again = lambda: torch._foreach_copy_(means, pairs[0::2])
    run = lambda: torch._foreach_lerp_(means, [x.float() for x in news], share)
    return Task(run, lambda _: dict(enumerate(means)), compiles=False, again=again)


@peer("eager")
def sum_squares(s, t):
    return Task(lambda: torch.stack(torch._foreach_norm(t[1:])).square().sum(), lambda y: {0: t[0] + y})


def operands(s, t):
    """q, k, v [B, heads, T, D], and what each query sees."""
    if s.cached == "true":
        q, k, v, slots, start, end = t[:6]
        d = int(s.width)
        q = q[..., : int(s.heads) * d].unflatten(-1, (-1, d))
        k, v = (c[slots.long()].unflatten(-1, (-1, d)) for c in (k, v))
    else:
        start, end = t[1:3]
        q, k, v = split(t[0], s)
    q, k, v = (y.transpose(1, 2).contiguous() for y in (q, k, v))
    empty = start >= end
    end = torch.where(empty, start + 1, end)  # a softmax over nothing is not a number
    return q, k, v, start, end, empty


def ways(q, k, v, start, end, grouped):
    """How attention may be done: name -> how queries, keys and values meet."""
    keys, longest = k.shape[2], int(end.max())
    causal = masks.is_causal(start, end) and q.shape[2] == keys
    seen = masks.sees(start, end, keys)
    sdpa = lambda q, k, v, **how: F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **how)

    def pinned(backend, **how):
        def run(q, k, v):
            with sdpa_kernel(backend):
                return sdpa(q, k, v, **how)

        return run

    blocks = lambda: masks.block_mask(start, end, keys, compiled=q.is_cuda)
    flex = torch.compile(flex_attention, dynamic=False)
    tuned = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    over = lambda attend, blocks: lambda q, k, v: attend(q, k, v, block_mask=blocks(), enable_gqa=grouped)
    kept = []

    def once():
        kept or kept.append(blocks())
        return kept[0]

    all_ways = {
        "sdpa": (lambda q, k, v: sdpa(q, k, v, is_causal=True)) if causal else lambda q, k, v: sdpa(q, k, v, attn_mask=seen),
        "sdpa sliced": lambda q, k, v: sdpa(q, k[:, :, :longest], v[:, :, :longest], attn_mask=seen[..., :longest]),
        "flex": over(flex, once),
        "flex autotuned": over(tuned, once),
        "flex, mask made anew": over(flex, blocks),
        "flex, documents and images": over(flex, lambda: spans(start, end, keys)),
        "dense mask, efficient": pinned(SDPBackend.EFFICIENT_ATTENTION, attn_mask=seen),
        "causal, cuDNN": pinned(SDPBackend.CUDNN_ATTENTION, is_causal=True),
        "causal, flash": pinned(SDPBackend.FLASH_ATTENTION, is_causal=True),
    }
    return all_ways, causal


def spans(start, end, keys):
    """B5: the mask as public Transfusion code builds it, a comparison for every image: (offset, length) of each, causal else."""
    b, t = end.shape
    at = torch.arange(t, device=end.device)
    ahead = end > at + 1
    first = ahead & torch.cat([torch.ones_like(ahead[:, :1]), end[:, 1:] != end[:, :-1]], -1)
    most = int(first.sum(-1).max())
    offsets = torch.full((b, max(1, most)), keys, device=end.device)
    ends = torch.full((b, max(1, most)), keys, device=end.device)
    for row in range(b):
        found = first[row].nonzero().flatten()
        offsets[row, : len(found)], ends[row, : len(found)] = found, end[row, found].long()

    def mask_mod(b, h, q, k):
        visible = q >= k
        for i in range(most):
            visible = visible | ((q >= offsets[b, i]) & (k >= offsets[b, i]) & (q < ends[b, i]) & (k < ends[b, i]))
        return visible & (k >= start[b, q])

    return create_block_mask(mask_mod, b, None, t, keys, device=end.device, BLOCK_SIZE=128, _compile=True)


def attention_variants(cached, queries, device, backward):
    if device == "cpu":
        plain = ["sdpa", "sdpa sliced"] if cached else ["sdpa"]
        return plain + (["flex"] if queries >= 128 and not backward else []), []
    plain = ["sdpa", "sdpa sliced"] if cached else ["flex", "flex autotuned", "flex, documents and images", "dense mask, efficient"]
    bounds = [] if cached else ["causal, cuDNN", "causal, flash", "flex, mask made anew"]
    return plain, bounds


@peer()
def attention(s, t):
    q, k, v, start, end, empty = operands(s, t)
    all_ways, _ = ways(q, k, v, start, end, s.heads != s.kv_heads)
    outs = lambda o: {0: (o.transpose(1, 2) * ~empty[..., None, None]).flatten(-2)}
    return Task(lambda: all_ways[s.variant](q, k, v), outs, compiles=False)


@peer()
def attention_bwd(s, t):
    q, k, v, start, end, empty = operands(s, t)
    if s.cached == "true":
        raise NotImplementedError("nothing trains over a cache")
    do = t[5].unflatten(-1, (-1, int(s.width))).transpose(1, 2) * ~empty[:, None, :, None]
    all_ways, _ = ways(q, k, v, start, end, s.heads != s.kv_heads)

    def outs(g):
        dq, dk, dv = (x.transpose(1, 2) for x in g)
        if s.rope == "Some":
            # The engine turns heads back within its time, this behind the clock.
            by = tuple(x.view(*dq.shape[:2], 1, -1) for x in rotation(s, t[6], -1.0))
            dq, dk = (zipped(rotate(unzip(x), by)) for x in (dq, dk))
        return {0: torch.cat([dq, dk, dv], 2).flatten(-2)}

    return gradient(all_ways[s.variant], [q, k, v], do, outs)


@peer("channels last")
def convolution(s, t):
    """B10: bf16 (or f32) 3x3, channels last, the algorithm chosen by cuDNN's own benchmark."""
    torch.backends.cudnn.benchmark = True
    n, side, c = int(s.images), int(s.side), int(s.channels)
    make = lambda *shape: torch.randn(*shape, device=s.device, dtype=s.dtype).to(memory_format=torch.channels_last)
    x, w = make(n, c, side, side), make(c, c, 3, 3) / (3 * c**0.5)
    run = lambda: F.conv2d(x, w, padding=1)
    check = F.conv2d(x[:1].float(), w.float(), padding=1)
    return Task(run, lambda y: {0: y[:1], "want": check}, compiles=False)


@peer("fused")
def update(s, t):
    """B8: clipping, fused AdamW over all weights, and the running means: the optimiser's whole step."""
    sizes = [int(n) for n in s.sizes]
    master = s.dtype == torch.bfloat16
    weights = [torch.full((n,), 0.5, device=s.device, requires_grad=True) for n in sizes]
    stored = [w.detach().bfloat16() for w in weights] if master else []
    means = [w.detach().clone() for w in weights] if s.ema else []
    optimiser = torch.optim.AdamW(weights, lr=s.lr, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=0.0, fused=True)
    grads = [torch.full_like(w, s.gradient) for w in weights]

    def run():
        for w, g in zip(weights, grads):
            w.grad = g
        norm = torch.nn.utils.clip_grad_norm_(weights, s.max_norm, foreach=True)
        optimiser.step()
        if stored:
            torch._foreach_copy_(stored, [w.detach() for w in weights])
        if means:
            torch._foreach_lerp_(means, [w.detach() for w in weights], 1 - s.ema)
        return norm

    def again():
        for g in grads:
            g.fill_(s.gradient)

    return Task(run, lambda norm: {0: norm}, compiles=False, again=again)


def variants(op, specs, device, dtype, rounded):
    """Which there are: those that do the same, by class, and bounds."""
    plain, bounds = list(PEERS[op][0]) if op in PEERS else [], []
    if op in ("attention", "attention_bwd"):
        cached, queries = len(specs) == (9 if op == "attention_bwd" else 6), specs[0][1]
        plain, bounds = attention_variants(cached, queries, device, op == "attention_bwd")
    narrow = plain if dtype == "bf16" else [f"{variant} bf16" for variant in plain]
    return {"classes": precision.classes(plain, narrow, dtype, rounded and op in PRODUCTS), "bounds": bounds}


state = {}


def build(op, told, variant, device, dtype, tensors_at=None, wants=None, **more):
    """Builds a variant; how far its results are from what they should be."""
    held = tensors.load(tensors_at, device) if tensors_at else {}
    ins = [held[f"in{i}"] for i in range(sum(name.startswith("in") for name in held))]
    words = variant.split()
    precision.use(words)
    if "bf16" in words:
        ins = [x.bfloat16() if x.is_floating_point() else x for x in ins]
    s = settings(told)
    s.text, s.variant, s.device = told, variant, device
    s.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
    vars(s).update(more)
    task = PEERS[op][1](s, ins)
    compiled = torch.compile(dynamic=False, fullgraph=True) if "compiled" in words else lambda f: f
    if hasattr(task, "backward"):
        task.run = task.backward(compiled)
    elif task.compiles:
        task.run = compiled(task.run)
    state.clear()
    state.update(task=task, device=device)
    outs = task.outs(task.run())
    if "want" in outs:
        return {"apart": apart(outs[0], outs["want"])}
    wants = {int(i): torch.tensor(w, device=device) for i, w in (wants or {}).items()}
    wants |= {i: held[f"out{i}"] for i in outs if f"out{i}" in held}
    return {"apart": max((apart(outs[i], w) for i, w in wants.items() if i in outs), default=None)}


def apart(have, want):
    """The largest difference over the largest number."""
    have, want = have.detach().double().flatten(), want.double().flatten()
    return ((have - want).abs().max() / want.abs().max().clamp(min=1e-30)).item() if len(want) else 0.0


def time(seconds, flush=0):
    """Milliseconds of every call; on a GPU by events, with its second-level cache overwritten before each."""
    task = state["task"]
    task.again()
    return {"ms": clock.calls(task.run, seconds, state["device"], flush)}


HANDLERS = {"variants": variants, "build": build, "time": time}
