"""Programs that are not ours, as judges."""

import os
from pathlib import Path

import torch


@torch.no_grad()
def rwkv_package_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    """(T, V) in float32, from the `rwkv` package. It computes ln0(emb) in the file's dtype: give it a float32 file."""
    os.environ.update(RWKV_V7_ON="0", RWKV_CUDA_ON="0", RWKV_JIT_ON="0")  # read by the package as it is imported
    from rwkv.model import RWKV

    return RWKV(model=str(path.with_suffix("")), strategy="cpu fp32").forward(tokens, None, full_output=True)[0]
