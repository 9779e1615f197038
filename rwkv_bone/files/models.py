"""Base models: opened strictly, placed on their device, told apart by a fingerprint."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..models.x060 import RWKV, ModelConfig
from .pth import FLOATS, open_tensors
from .safetensors import is_safetensors


def open_model(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and mapped tensors of an RWKV-6 `.pth`; UserError unless it is one, whole."""
    tensors = open_tensors(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {name} is {tensor.dtype}; wanted bfloat16, float16 or float32")
        if tensor.numel() == 0:
            raise UserError(f"{path}: {name} is empty, {tuple(tensor.shape)}; the file is damaged")
    config = ModelConfig.from_state_dict(tensors, str(path))
    if is_safetensors(path):  # sorted by name there, and RWKV's programs want time_maa before time_faaaa
        tensors = {name: tensors[name] for name in config.shapes()}
    return config, tensors


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> RWKV:
    """The model of a `.pth`, strictly: each tensor goes straight from the mapped file to its place, in `dtype` if given.

    Without `dtype` on the CPU nothing is copied at all. `model.fingerprint` identifies the file's tensors.
    """
    config, tensors = open_model(path)
    with torch.device("meta"):
        model = RWKV(config)
    fingerprint_ = fingerprint(tensors)
    placed = {name: t.to(device=device, dtype=dtype or t.dtype).contiguous() for name, t in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    model.fingerprint, model.file_dtype = fingerprint_, tensors["emb.weight"].dtype
    return model


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells one base from another: names, dtypes, shapes and 3 x 4 KiB of each tensor, hashed. Reads little."""
    return combine(sample(name, tensor) for name, tensor in tensors.items())


def sample(name: str, tensor: Tensor) -> str:
    """One tensor's share of the fingerprint."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    digest = hashlib.sha256()
    for start in (0, len(data) // 2, max(0, len(data) - 4096)):
        digest.update(data[start : start + 4096].numpy().tobytes())
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}"


def combine(samples: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(samples)).encode()).hexdigest()
