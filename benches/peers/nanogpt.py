"""The peer of `text-tiny`: a GPT in the configuration of nanoGPT's CPU recipe, under PyTorch f32.

Written from the architecture (GPT-2: pre-norm LayerNorm without bias, learned positions, GELU, tied head) and the
settings in nanoGPT's README: 4 layers, 4 heads, width 128, 64 positions, batch 12, 2000 steps, no dropout, AdamW
(0.9, 0.99), 1e-3 to 1e-4, warm-up 100, decay 0.1 on matrices, clipping at 1, no torch.compile. Characters are the
vocabulary. Prints one JSON line.

    python nanogpt.py --text train.txt --val-bytes 111540 --steps 2000 --threads 2 --eval
    python nanogpt.py --text train.txt --val-bytes 111540 --steps 200 --threads 2 --no-eval      # timing only
"""

import argparse
import json
import math
import statistics
import time

import torch
import torch.nn as nn
import torch.nn.functional as F

LAYERS, HEADS, WIDTH, BLOCK, BATCH = 4, 4, 128, 64, 12
PEAK_RATE, LAST_RATE, WARM_UP, BETAS, DECAY, CLIP = 1e-3, 1e-4, 100, (0.9, 0.99), 0.1, 1.0


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(WIDTH, bias=False)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_2 = nn.LayerNorm(WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = (h.view(b, t, HEADS, c // HEADS).transpose(1, 2) for h in self.qkv(self.norm_1(x)).split(c, dim=2))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(heads.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


class Gpt(nn.Module):
    def __init__(self, vocab):
        super().__init__()
        self.tokens = nn.Embedding(vocab, WIDTH)
        self.positions = nn.Embedding(BLOCK, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH, bias=False)
        for name, p in self.named_parameters():
            if p.dim() == 2:
                feeds_residual = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * LAYERS) if feeds_residual else 0.02)

    def forward(self, tokens, targets):
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = F.linear(self.norm(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def learning_rate(step, steps):
    if step < WARM_UP:
        return PEAK_RATE * (step + 1) / (WARM_UP + 1)
    done = (step - WARM_UP) / max(1, steps - WARM_UP)
    return LAST_RATE + 0.5 * (PEAK_RATE - LAST_RATE) * (1 + math.cos(math.pi * done))


def train(model, data, steps, fused):
    """Trains in place; returns the milliseconds of every step: batch, forward, backward, clipping, optimiser."""
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": DECAY},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS, fused=fused)
    window, times = torch.arange(BLOCK), []
    for step in range(steps):
        start = time.perf_counter()
        at = torch.randint(len(data) - BLOCK, (BATCH, 1)) + window
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = model(data[at], data[at + 1])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        times.append(1e3 * (time.perf_counter() - start))
    return times


@torch.no_grad()
def validate(model, data):
    """Mean nats per character over every non-overlapping window; the first character of the data is never a target."""
    windows = (len(data) - 1) // BLOCK
    tokens = data[: windows * BLOCK].view(windows, BLOCK)
    targets = data[1 : windows * BLOCK + 1].view(windows, BLOCK)
    parts = [(model(x, y).item(), len(x)) for x, y in zip(tokens.split(64), targets.split(64))]
    return sum(loss * n for loss, n in parts) / windows, windows


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cli.add_argument("--text", required=True)
    cli.add_argument("--val-bytes", type=int, default=111540, help="held out from the end of the text")
    cli.add_argument("--steps", type=int, default=2000)
    cli.add_argument("--threads", type=int, default=2)
    cli.add_argument("--seed", type=int, default=1337)
    cli.add_argument("--eval", action=argparse.BooleanOptionalAction, default=True)
    cli.add_argument("--fused", action="store_true", help="PyTorch's fused AdamW; nanoGPT on a CPU does not use it")
    args = cli.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    text = open(args.text, "rb").read()
    characters = sorted(set(text))
    code = {c: i for i, c in enumerate(characters)}
    data = torch.tensor([code[c] for c in text])
    training, held_out = data[: len(data) - args.val_bytes], data[len(data) - args.val_bytes :]
    model = Gpt(len(characters))
    times = train(model, training, args.steps, args.fused)
    report = {
        "peer": "nanogpt",
        "torch": torch.__version__,
        "threads": args.threads,
        "seed": args.seed,
        "fused_adamw": args.fused,
        "vocab": len(characters),
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_without_positions": sum(p.numel() for p in model.parameters()) - BLOCK * WIDTH,
        "steps": args.steps,
        "ms_per_step_median": round(statistics.median(times), 3),
        "ms_per_step_mean": round(statistics.fmean(times), 3),
    }
    if args.eval:
        loss, windows = validate(model, held_out)
        report |= {"validation_loss": round(loss, 4), "validation_windows": windows}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
