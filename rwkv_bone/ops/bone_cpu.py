"""Bone's forward and backward on the CPU, what lies between its matrix products in one pass over memory: cuda/bone_cpu.cpp.

The formulas are in rwkv_bone/peft/bone.py. The kernels are part of the library of the WKV6 kernel.
"""

import functools

import torch
from torch import Tensor

from ..errors import UserError
from . import wkv6_cpu

WIDEST = 4096  # kWidest in cuda/bone_cpu.cpp
AT_ONCE = 512  # tokens of a large product
FEW = 128  # tokens of the small ones, a thread: what passes between these stays in its core's cache


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
    x_plus_u = torch.empty_like(x[: many()])  # one for all tokens: fresh memory costs more than what is done in it
    work = torch.empty_like(x[: few()])
    for rows in spans(len(x), many()):
        xs, ys, xus = x[rows], y[rows], x_plus_u[: rows.stop - rows.start]
        for part in spans(len(xs), few()):
            u = work[: part.stop - part.start].view(m, -1, r)
            torch.bmm(pieces(xs[part], r), b.mT, out=u)
            call("bone_cpu_forward", xs[part], len(w), r, xs[part], u, xus[part], ys[part])
        # the product is added to the tiles before it is rounded: s is small beside it at the start of a training
        ys.addmm_(xus, w.T)
    return y


def backward(x: Tensor, w: Tensor, b: Tensor, g: Tensor, wants_dx: bool) -> tuple[Tensor | None, Tensor]:
    """dx (n, in) in x's dtype, if wanted, and db (m, r, r) in float32, from g (n, out). x and g are contiguous."""
    m, r, _ = b.shape
    dx = torch.empty_like(x if wants_dx else x[: many()])
    db = torch.zeros(m, r, r)
    work = x.new_empty(2, min(len(x), few()), x.shape[1])
    for rows in spans(len(x), many()):
        xs, gs = x[rows], g[rows]
        q = torch.mm(gs, w, out=dx[rows] if wants_dx else dx[: len(xs)])
        for part in spans(len(xs), few()):
            du, x_pieces = work[:, : part.stop - part.start].reshape(2, m, -1, r)
            call("bone_cpu_backward", xs[part], len(w), r, xs[part], gs[part], q[part], du, x_pieces)
            db += torch.bmm(du.mT, x_pieces)
            if wants_dx:
                pieces(q[part], r).baddbmm_(du, b)
    return dx if wants_dx else None, db


def spans(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def few() -> int:
    return FEW * torch.get_num_threads()


def many() -> int:
    return max(AT_ONCE, few())


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
