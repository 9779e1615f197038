"""Sums and products in low precision that keep, on average, what is too small for one rounding to keep.

What a just started adapter adds is some 1e-4 of what it is added to, and bf16 resolves 4e-3: rounded to the nearest, x + u is x,
and the adapter does nothing. Here the sum is rounded up with the probability of its distance from the number below, so that its
expected value is exact, and over the hundreds of terms of a dot product u arrives. The price is noise, no larger than the
rounding's own and falling with u: an x that bf16 holds exactly stays as it is where u is zero. The "probability" is a fixed
low-discrepancy pattern over (row, column): the same input gives the same output, as recomputation in backward requires.
"""

import math

import torch
from torch import Tensor

from ..ops.bone import cpu as bone_cpu

COLUMN, ROW = 40503, 49473  # the golden ratio's and the plastic ratio's fractions in 2^-16: Kronecker sequences


def add_rounded_(u: Tensor, x: Tensor, tile: Tensor | None = None) -> Tensor:
    """u += x for u and x (n, width) of one dtype, unbiased where that is below float32. Returns u.

    tile (n, r), if given, is added too, each row repeated along u's, the last time as far as it fits.
    """
    if torch.finfo(u.dtype).bits >= 32:
        return u.add_(x) if tile is None else u.add_(tiled(tile, u.shape[1])).add_(x)
    if bone_cpu.add_fits(u, x):
        return bone_cpu.add_(u, x, tile)
    n, width = u.shape
    at_once = max(1, (2**22 if u.is_cuda else 2**18) // width)  # rows whose float32 temporaries stay in the cache
    for first in range(0, n, at_once):
        rows = slice(first, first + at_once)
        total = x[rows].float().add_(u[rows])
        u[rows] = dithered(total if tile is None else total.add_(tiled(tile[rows], width)), u.dtype, first)
        if u.is_meta or (type(u) is not Tensor and not torch.compiler.is_compiling()):
            break  # a tensor without values, whose memory is counted: these rows take what the others would
    return u


def tiled(tile: Tensor, width: int) -> Tensor:
    """(n, r) -> (n, width), each row repeated."""
    return tile.repeat(1, -(-width // tile.shape[1]))[:, :width]


def rounded_product(y: Tensor, c: Tensor) -> Tensor:
    """y (n, width) times c (width,) of float32 or more, in y's dtype, unbiased where that is below float32: a new tensor."""
    return y * c if torch.finfo(y.dtype).bits >= 32 else dithered(y * c, y.dtype)


def dithered(value: Tensor, dtype: torch.dtype, first_row: int = 0) -> Tensor:
    """float32 (n, width), which is overwritten, rounded without bias to bf16 or fp16. Its rows count from `first_row`."""
    lost = round(math.log2(torch.finfo(dtype).eps / torch.finfo(torch.float32).eps))  # bits of the mantissa to drop
    n, width = value.shape
    row, column = (
        (torch.arange(first, first + size, device=value.device) * step % 2**16 >> (16 - lost)).to(torch.int32)
        for first, size, step in ((first_row, n, ROW), (0, width, COLUMN))
    )
    bits = value.view(torch.int32).clamp_(max=0x7FBFFFFF)  # a NaN of all ones, as GPUs make them, would overflow into a number
    bits += row.unsqueeze(1) ^ column  # 0 ... 2^lost - 1, and each once: carries into the kept bits or is dropped
    bits &= -(2**lost)
    return value.to(dtype)
