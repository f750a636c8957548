"""Llama folders between us and Hugging Face `transformers`.

    python hf_llama.py write                   # tests/golden/hf_llama: tiny random folders and the logits to expect
    python hf_llama.py check FOLDER LOGITS     # a folder we exported, and our logits, against transformers

LOGITS is a safetensors file with `tokens` (integers, [T] or [B, T]) and `logits` (f32, tokens' shape + [V]).
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

GOLDEN = Path(__file__).parent.parent / "golden" / "hf_llama"
TOLERANCE = 1e-4
TOKENS = torch.tensor([256, 72, 105, 0, 255, 33, 105, 72, 257], dtype=torch.int32)
MODELS = {
    "untied": dict(hidden_size=32, intermediate_size=48, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=False),
    "tied": dict(hidden_size=16, intermediate_size=24, rms_norm_eps=1e-6, rope_theta=500000.0, tie_word_embeddings=True),
}


def load(folder):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    return model.eval(), info


@torch.no_grad()
def logits(model, tokens):
    return model(tokens.long().reshape(-1, tokens.shape[-1])).logits.reshape(*tokens.shape, -1)


def write(name, seed, rope_theta, **sizes):
    torch.manual_seed(seed)
    folder = GOLDEN / name
    heads = dict(num_hidden_layers=2, num_attention_heads=sizes["hidden_size"] // 8, num_key_value_heads=2)
    rope = {"rope_type": "default", "rope_theta": rope_theta}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=264, max_position_embeddings=64, rope_parameters=rope, **heads, **sizes))
    for parameter in model.parameters():  # far from the initialisation: norms beside 1, attention beside uniform
        parameter.data += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if name == "tied":
        rope_as_before_version_5(folder / "config.json")
    save_file({"tokens": TOKENS, "logits": logits(load(folder)[0], TOKENS)}, folder / "expected.safetensors")


def rope_as_before_version_5(path):
    """`rope_theta` at the top level, where most published folders have it."""
    config = json.loads(path.read_text())
    config["rope_theta"] = config.pop("rope_parameters")["rope_theta"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def check(folder, ours):
    model, info = load(folder)
    foreign = sorted(key for key in info["unexpected_keys"] if not key.startswith("transfusion."))
    wrong = {"missing": sorted(info["missing_keys"]), "unexpected": foreign, "mismatched": sorted(info["mismatched_keys"])}
    ours = load_file(ours)
    theirs = logits(model, ours["tokens"])
    if theirs.shape != ours["logits"].shape:
        sys.exit(f"error: our logits are {list(ours['logits'].shape)}, those of transformers {list(theirs.shape)}")
    apart = (theirs - ours["logits"]).abs().max().item()
    print(json.dumps({"class": type(model).__name__, "max_difference": apart, "tolerance": TOLERANCE, **wrong}))
    if any(wrong.values()) or not apart <= TOLERANCE:
        sys.exit(1)


def main():
    cli = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = cli.add_subparsers(dest="mode", required=True)
    modes.add_parser("write")
    checked = modes.add_parser("check")
    checked.add_argument("folder")
    checked.add_argument("logits")
    args = cli.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    if args.mode == "check":
        return check(args.folder, args.logits)
    for seed, (name, sizes) in enumerate(MODELS.items()):
        write(name, seed, **sizes)


if __name__ == "__main__":
    main()
