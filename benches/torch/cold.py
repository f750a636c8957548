"""A cold start under PyTorch: imports, loads an exported folder, and says the first token behind a prompt.

    python cold.py FOLDER THREADS TEXT
"""

import json
import sys
from pathlib import Path

import torch

import tensors
from model import Model
from sample import Decoder


def main():
    folder, threads, text = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].encode()
    torch.set_num_threads(threads)
    config = json.loads((folder / "config.json").read_text())
    model = Model(config, tensors.load(folder / "model.safetensors"))
    prompt = torch.tensor([[config["bos_token_id"], *text]])
    decoder = Decoder("eager", model, prompt[:, :-1], config["max_position_embeddings"], "cpu")
    with torch.no_grad():
        decoder.prefill()
        print(decoder.next(prompt[:, -1], decoder.at)[1].item())


if __name__ == "__main__":
    main()
