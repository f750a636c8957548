"""What products are done in: variants by class, and the switch that PyTorch has for it.

`f32` is PyTorch as it starts. `medium` stores f32 and lets PyTorch round the factors of products to bf16, as the engine does
where it is allowed to (torch.set_float32_matmul_precision). `bf16` has bf16 weights, or casts to bf16.
"""

import torch


def classes(plain, narrow, dtype, rounded):
    """Names and variants; of a model stored in f32 the first is `f32`, and where the engine rounds the others follow."""
    if dtype == "bf16":
        return [["bf16", narrow]]
    medium = [f"{variant} medium" for variant in plain]
    return [["f32", plain]] + ([["medium", medium], ["bf16", narrow]] if rounded else [])


def use(words):
    """What the variant of these words is allowed to do from now on."""
    torch.set_float32_matmul_precision("medium" if "medium" in words else "highest")
