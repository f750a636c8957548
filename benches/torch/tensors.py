"""safetensors files with nothing but torch."""

import json

import torch

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "I32": torch.int32, "U8": torch.uint8}


def load(path, device="cpu"):
    """Name -> tensor."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        data = bytearray(file.read())
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        (start, end), shape, dtype = info["data_offsets"], info["shape"], DTYPES[info["dtype"]]
        flat = torch.frombuffer(data, dtype=dtype, count=(end - start) // dtype.itemsize, offset=start) if end > start else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(shape).clone().to(device)
    return tensors
