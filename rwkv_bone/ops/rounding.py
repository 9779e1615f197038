"""What merging does to each entry of a large weight in one pass of cpp/rounding_cpu.cpp: round it, compare it with what it was.

Where no compiler is there, or for a tensor of another dtype, merging/merge.py does the same in torch operations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .cpu import INT, POINTER, SIZE, Kernels

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 3}
LARGE = 1 << 20  # entries of a tensor for which the library is worth building
kernels = Kernels("rounding", {"effect": [INT, INT, SIZE, *[POINTER] * 5]})


class Sums(NamedTuple):
    """Sums over the entries; see `merging.merge.Effect`, whose fields these are."""

    weight: float
    update: float
    lost: float
    moved: int
    vanished: int


def fits(before: Tensor, rounded: Tensor) -> bool:
    """Whether the kernel takes these tensors, and they are so large that it is to be built for them."""
    return rounded.numel() >= LARGE and all(t.is_cpu and t.dtype in TYPES for t in (before, rounded)) and kernels.available


def effect(before: Tensor, exact: Tensor, rounded: Tensor) -> Sums:
    """Round `exact` (float32) into `rounded`, which is contiguous; the sums that this and `before` make."""
    before, exact = before.contiguous(), exact.contiguous()
    squares, counts = torch.empty(3, dtype=torch.float64), torch.empty(2, dtype=torch.int64)
    kernels.call("effect", TYPES[before.dtype], TYPES[rounded.dtype], exact.numel(), before, exact, rounded, squares, counts)
    return Sums(*squares.tolist(), *counts.tolist())

