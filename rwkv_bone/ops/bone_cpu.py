"""Bone's forward and backward on the CPU, what lies between its matrix products in one pass over memory: cuda/bone_cpu.cpp.

The formulas are in rwkv_bone/peft/bone.py. The kernels are part of the library of the WKV6 kernel.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UserError
from . import wkv6_cpu

WIDEST = 4096  # kWidest in cuda/bone_cpu.cpp
AT_ONCE = 512  # tokens: enough for the large products, few enough for temporaries that stay in the caches
SMALL = 2**20  # numbers of x that are taken at once even if they are more tokens


def fits(x: Tensor, r: int) -> bool:
    """Whether the kernels take x (n, in) with pieces of r."""
    return (
        type(x) is Tensor  # one that has memory
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and r <= WIDEST
        and x.shape[1] % r == 0
        and available()
    )


def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """y (n, out) of x (n, in), w (out, in) and b (m, r, r), of one dtype, x contiguous."""
    m, r, _ = b.shape
    y = x.new_empty(len(x), len(w))
    for rows, u, xu in chunks(x, m, r):
        xs, ys = x[rows], y[rows]
        torch.bmm(pieces(xs, r), b.mT, out=u)
        xu = xu.view_as(xs)
        call("bone_cpu_forward", xs, ys.shape[1], r, xs, u, xu, ys)
        # the product is added to the tiles before it is rounded: s is small beside it at the start of a training
        ys.addmm_(xu, w.T)
    return y


def backward(x: Tensor, w: Tensor, b: Tensor, g: Tensor, wants_dx: bool) -> tuple[Tensor | None, Tensor]:
    """dx (n, in) in x's dtype, if wanted, and db (m, r, r) in float32, from g (n, out). x and g are contiguous."""
    m, r, _ = b.shape
    dx = torch.empty_like(x) if wants_dx else None
    db = torch.zeros(m, r, r)
    for rows, du, x_pieces in chunks(x, m, r):
        xs, gs = x[rows], g[rows]
        q = torch.mm(gs, w, out=None if dx is None else dx[rows])
        call("bone_cpu_backward", xs, gs.shape[1], r, xs, gs, q, du, x_pieces)
        db += torch.bmm(du.mT, x_pieces)
        if dx is not None:
            pieces(q, r).baddbmm_(du, b)
    return dx, db


def chunks(x: Tensor, m: int, r: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Slices of the tokens, with two (m, tokens, r) to work in: fresh memory costs more than what is done in it."""
    n, in_ = x.shape
    size = min(n, max(AT_ONCE, SMALL // in_ // AT_ONCE * AT_ONCE))
    work = x.new_empty(2, size * in_)
    for start in range(0, n, size):
        rows = slice(start, min(start + size, n))
        a, b = work[:, : (rows.stop - start) * in_].view(2, m, -1, r)
        yield rows, a, b


def pieces(x: Tensor, r: int) -> Tensor:
    """(n, in) -> (in / r, n, r), a view."""
    return x.unflatten(1, (-1, r)).transpose(0, 1)


def call(name: str, x: Tensor, out: int, r: int, *tensors: Tensor) -> None:
    head = wkv6_cpu.variant_number(None), torch.get_num_threads(), wkv6_cpu.torch_threads(), x.dtype == torch.bfloat16
    getattr(wkv6_cpu.library(), name)(*head, *x.shape, out, r, *(t.data_ptr() for t in tensors))


@functools.cache
def available() -> bool:
    """Whether the library is there. Where it cannot be built, the WKV6 op says so, and --op torch has no need of it."""
    try:
        return bool(wkv6_cpu.library())
    except UserError:
        return False
