"""The WKV6 CPU kernel of cpp/wkv6_cpu.cpp, built on first use and called through ctypes.

`forward` and `backward` take contiguous CPU tensors whose shapes and dtypes `rwkv_bone.ops.wkv6` has checked.
"""

from typing import Any

import torch
from torch import Tensor

from ..cpu import DTYPES, INT, POINTER, SIZE, Kernels

CHECKPOINT = 128  # tokens between the states that forward keeps for backward; kCheckpoint in cpp/wkv6_cpu.h
HEAD: list[Any] = [INT, INT, *[SIZE] * 4]  # dtypes of r and of log_w, B, T, H, N
kernels = Kernels("wkv6", {"forward": HEAD + [POINTER] * 9, "backward": HEAD + [POINTER] * 14})


def describe(dtype: torch.dtype, N: int) -> str:
    return kernels.describe()


def saved_shape(r: Tensor) -> tuple[int, ...]:
    """The shape of the states that forward keeps for backward: one every CHECKPOINT tokens, the initial one first."""
    B, T, H, N = r.shape
    return (B, H, (T + CHECKPOINT - 1) // CHECKPOINT, N, N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, save: bool,
    variant: str | None = None, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states that backward needs (empty unless `save`)."""
    B, T, H, N = r.shape
    y = torch.empty_like(r)
    final_state = u.new_empty(B, H, N, N)
    saved = u.new_empty(saved_shape(r) if save else 0)
    kernels.call(
        "forward", DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r, k, v, log_w, u, state, y, final_state, saved if save else None, variant=variant, threads=threads,
    )  # fmt: skip
    return y, final_state, saved


def backward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, saved: Tensor, gy: Tensor, gfinal: Tensor | None,
    variant: str | None = None, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of r, k, v, log_w, u and state from those of y and of the final state."""
    B, T, H, N = r.shape
    gr, gk, gv, gw = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v), torch.empty_like(log_w)
    gu, gstate = torch.empty_like(u), u.new_empty(B, H, N, N)
    kernels.call(
        "backward", DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r, k, v, log_w, u, saved, gy, gfinal, gr, gk, gv, gw, gu, gstate, variant=variant, threads=threads,
    )  # fmt: skip
    return gr, gk, gv, gw, gu, gstate
