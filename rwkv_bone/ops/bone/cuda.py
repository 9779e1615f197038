"""The CUDA kernels of cuda/bone.cu: what Bone does between its matrix products, in bf16, in one pass over memory each.

Built and checked on first use like those of WKV6. Where they cannot be used, it is said once, and Bone does the same in several
torch operations.
"""

import ctypes
import functools
import sys

import torch
from torch import Tensor

from ...errors import UserError
from ..cuda import INT, POINTER, SIZE, Functions, declare, load, run
from ..selfcheck import Verdict, verdict

FUNCTIONS: Functions = {f"bone_{name}": (INT, [SIZE] + [INT] * 3 + [POINTER] * 4) for name in ("forward", "backward")}


def fits(x: Tensor, g: Tensor | None, out: int, r: int) -> bool:
    """Whether the kernels take x (n, in), in backward g (n, out) too, both contiguous, and pieces of r."""
    return (
        x.is_cuda
        and not torch.compiler.is_compiling()
        and x.dtype == torch.bfloat16
        and sizes_fit(x.shape[1], out, r)
        and not any(t.data_ptr() % 16 for t in (x, g) if t is not None)  # a view into the middle of something
        and library(x.device) is not None
    )


def sizes_fit(in_: int, out: int, r: int) -> bool:
    return r % 8 == 0 and r <= 2048 and in_ % r == 0 and out % 8 == 0


def forward(x: Tensor, u: Tensor, y: Tensor) -> None:
    """u (n, m, r) becomes x (n, in) + u, rounded without bias; y (n, out) becomes the sum of u's pieces, in every piece."""
    n, _, r = u.shape
    lib = library(x.device)
    assert lib is not None  # `fits` has seen it
    run(lib.bone_forward, x.device, n, x.shape[1], y.shape[1], r, x, u, y)


def backward(g: Tensor, q: Tensor, du: Tensor) -> None:
    """du (n, m, r) becomes q (n, m, r) + the sum of g's (n, out) pieces, in every piece."""
    n, m, r = q.shape
    lib = library(g.device)
    assert lib is not None
    run(lib.bone_backward, g.device, n, m * r, g.shape[1], r, g, q, du)


def describe(device: torch.device) -> str:
    """What computes Bone's sums in bf16 on a GPU, in words."""
    return f"CUDA kernels, checked on this GPU: {_verdict(device).text}" if _verdict(device).ok else "in plain torch"


def library(device: torch.device) -> ctypes.CDLL | None:
    """The kernels, or None where they are not to be used."""
    return _load(torch.cuda.get_device_capability(device)) if checking or _verdict(device).ok else None


checking = False  # by the process that finds the verdict


@functools.cache
def _load(capability: tuple[int, int]) -> ctypes.CDLL:
    return declare(load("bone", capability), FUNCTIONS)


@functools.cache
def _verdict(device: torch.device) -> Verdict:
    try:
        found = verdict("bone", "bone", torch.bfloat16, 0, device)
    except UserError as error:
        found = Verdict(False, str(error))
    if not found.ok:
        slower = "Bone's own kernels cannot be used, so its sums take more passes over memory"
        print(f"rwkv-bone: {slower}: {found.text}", file=sys.stderr)
    return found
