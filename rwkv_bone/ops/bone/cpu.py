"""Bone's forward and backward on the CPU: all but the two large products is in cpp/bone_cpu.cpp, in one pass over each tensor.

The formulas are in rwkv_bone/peft/bone.py.

float32 has a second form, for many tokens, which makes W' and still needs neither its gradient nor a third large product:

    y = x W'^T;   dx = g W';   dx_j + t = q_j + du_j B_j + t = du_j (I + B_j),  so  dB_j = (I + B_j)^-T sum (dx_j + t)^T x_j

It takes (n + 2 out) in r multiplications beside the two large products, where the other takes 3 n in r. In bf16 it would lose
what W' has beside W (rwkv_bone/peft/rounding.py).
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cpu import INT, POINTER, SIZE, VARIANTS, Kernels

WIDEST = 512  # of a piece: the products of wider ones are such as torch's are made for
LANES = 16  # kLanes in cpp/bone_cpu.cpp
AT_ONCE = 512  # tokens of a large product for each thread, and for two at least: fewer are slower, more take more memory
MANY = 2  # tokens for each output from which on making W' is the faster
HEAD: list[Any] = [INT, INT, *[SIZE] * 4]  # bf16, pairs, n, in, out, r
BACKWARD: list[Any] = [POINTER] * 5 + [SIZE, SIZE, INT]
ADD: list[Any] = [*[SIZE] * 5, *[POINTER] * 3]  # n, width, r, entries from one row to the next of u and of x
kernels = Kernels("bone", {"forward": HEAD + [POINTER] * 4, "backward": HEAD + BACKWARD, "add": ADD})


def fits(x: Tensor, r: int) -> bool:
    """Whether the kernels take x (n, in) with pieces of r."""
    return (
        type(x) is Tensor  # one that has memory
        and not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and x.dtype in (torch.float32, torch.bfloat16)
        and r <= WIDEST
        and x.shape[1] % r == 0
        and kernels.available  # where it cannot be built, the WKV6 op says so, and --op torch has no need of it
    )


def forward(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """y (n, out) of x (n, in), w (out, in) and b (m, r, r), x and w of one dtype, x contiguous."""
    if many(x, w, b):
        return torch.mm(x, merged(w, b).T)
    y = x.new_empty(len(x), len(w))
    x_plus_u = torch.empty_like(x[: at_once()])  # one for all tokens: fresh memory costs more than what is done in it
    r, b = b.shape[-1], packed(b.mT, x.dtype)
    for rows in spans(len(x)):
        xs, ys, xus = x[rows], y[rows], x_plus_u[: rows.stop - rows.start]
        call("forward", xs, len(w), r, xs, b, xus, ys)
        # the product is added to the tiles before it is rounded: s is small beside it at the start of a training
        ys.addmm_(xus, w.T)
    return y


def backward(x: Tensor, w: Tensor, b: Tensor, g: Tensor, wants_dx: bool) -> tuple[Tensor | None, Tensor]:
    """dx (n, in) in x's dtype, if wanted, and db (m, r, r) in float32, from g (n, out). x and g are contiguous."""
    b = b.float()
    m, r, _ = b.shape
    width = -(-r // LANES) * LANES
    shares = min(torch.get_num_threads(), max(1, len(w) // (2 * width)))  # of the tokens: their db take half of W's size at most
    groups = -(-torch.get_num_threads() // shares)  # of the pieces
    db = torch.zeros(shares, m, r, width, dtype=torch.float32)
    inverse = inverted(torch.eye(r, dtype=b.dtype) + b) if many(x, w, b) else None
    w_ = w if inverse is None else merged(w, b)
    b = packed(b, x.dtype)
    dx = torch.empty_like(x if wants_dx else x[: at_once()])
    for rows in spans(len(x)):
        xs, gs = x[rows], g[rows]
        q = torch.mm(gs, w_, out=dx[rows] if wants_dx else dx[: len(xs)])
        call("backward", xs, len(w), r, xs, b, gs, q, db, shares, groups, wants_dx and inverse is None)
    db = db.sum(0)[..., :r]
    if inverse is not None:  # what the kernel summed is (dx_j + t)^T x_j
        db = inverse.mT @ db
    return dx if wants_dx else None, db


def add_fits(u: Tensor, x: Tensor) -> bool:
    """Whether `add_` takes u and x (n, width)."""
    return (
        all(type(t) is Tensor and t.device.type == "cpu" and t.dtype == torch.bfloat16 and t.stride(1) == 1 for t in (u, x))
        and not torch.compiler.is_compiling()
        and kernels.available
    )


def add_(u: Tensor, x: Tensor, tile: Tensor | None) -> Tensor:
    """u += x, and `tile` (n, r) repeated along the rows, rounded without bias as in rwkv_bone/peft/rounding.py. Returns u."""
    tile = None if tile is None else tile.to(u.dtype).contiguous()
    kernels.call("add", *u.shape, 0 if tile is None else tile.shape[1], u.stride(0), x.stride(0), u, x, tile)
    return u


def many(x: Tensor, w: Tensor, b: Tensor) -> bool:
    """Whether the form that makes W' takes less time, and is to be of float32."""
    float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return float32 and len(w) % b.shape[-1] == 0 and len(x) >= MANY * len(w)


def inverted(a: Tensor) -> Tensor | None:
    """The inverse of each a (m, r, r), or None where that would cost more than two of float32's seven digits."""
    inverse, failed = torch.linalg.inv_ex(a)
    error = norm(a) * norm(inverse)  # a NaN of a failed one is not below anything
    return inverse if not failed.any() and (error < 100).all() else None


def norm(a: Tensor) -> Tensor:
    """A bound on the 2-norm of each matrix of a (m, r, r): |a|_2^2 <= |a|_1 |a|_inf."""
    sizes = a.abs()
    return (sizes.sum(1).amax(1) * sizes.sum(2).amax(1)).sqrt()


def merged(w: Tensor, b: Tensor) -> Tensor:
    """W' = W + W B + B, of float32."""
    m, r, _ = b.shape
    w = w.contiguous()
    made = torch.empty_like(w)
    call("forward", w, 0, r, w, packed(b, w.dtype), made, made[:0])
    made.view(-1, r, m, r).add_(b.transpose(0, 1))
    return made


def spans(n: int) -> list[slice]:
    size = at_once()
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def at_once() -> int:
    return AT_ONCE * max(2, torch.get_num_threads())


def pairs(dtype: torch.dtype, r: int) -> int:
    """How bf16 is multiplied: 0 as float32, 1 in pairs along the sum, 2 in squares of pairs (AMX) where r lets it."""
    return pairs_here() if dtype == torch.bfloat16 and r % 2 == 0 else 0


def pairs_here() -> int:
    return pairs_of(kernels.variants[-1])


@functools.cache  # asking the processor takes long on a virtual machine
def pairs_of(variant: str) -> int:
    return kernels.library.bone_cpu_pairs(VARIANTS[variant])


def packed(b: Tensor, dtype: torch.dtype) -> Tensor:
    """b (m, r, r), the middle index the summed one, as the kernels for `dtype` read it: padded, and float32 or pairs of bf16."""
    r = b.shape[-1]
    b = F.pad(b.to(dtype), (0, -r % LANES))
    return (b.unflatten(1, (-1, 2)).transpose(2, 3) if pairs(dtype, r) else b.float()).contiguous()


def call(function: str, x: Tensor, out: int, r: int, *arguments: Tensor | int) -> None:
    kernels.call(function, x.dtype == torch.bfloat16, pairs(x.dtype, r), *x.shape, out, r, *arguments)
