"""The WKV7 CPU kernel of cpp/wkv7_cpu.cpp, built on first use and called through ctypes.

`forward` and `backward` take contiguous CPU tensors whose shapes and dtypes the caller has checked: r, k, v, a, b, y and their
gradients (B, T, H, N) in float32, bfloat16 or float64, N at most 128; log_w and its gradient the same, or float32; states
(B, H, N, N), indexed [value, key], float32 (float64 for float64); reset (B, T) bool, True at a token before which the state
becomes zero. Over any 16 tokens log_w may sum to -87 at the least (the model's is at least -0.607 a token).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..cpu import DTYPES, INT, POINTER, SIZE, Kernels

CHECKPOINT = 64  # tokens between the states that forward keeps for backward; kCheckpoint in cpp/wkv7_cpu.h
HEAD: list[Any] = [INT, INT, *[SIZE] * 4]  # dtypes of r and of log_w, B, T, H, N
kernels = Kernels("wkv7", {"forward": HEAD + [POINTER] * 11, "backward": HEAD + [POINTER] * 17})


def new(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Memory for a result of `like`'s dtype and, usually, shape; the kernel writes every element and nothing beside it."""
    return torch.empty_like(like) if shape is None else like.new_empty(shape)


def describe(dtype: torch.dtype, N: int) -> str:
    check_head(N)
    return kernels.describe("portable" if dtype == torch.float64 else None)  # float64 has portable kernels only


def check_head(N: int) -> None:
    if N > 128:
        raise ValueError(f"wkv7: the CPU kernel takes heads of up to 128 channels, not {N}; use op='torch'")


def saved_shape(r: Tensor) -> tuple[int, ...]:
    """The shape of the states that forward keeps for backward: one every CHECKPOINT tokens, the initial one first."""
    B, T, H, N = r.shape
    return (B, H, (T + CHECKPOINT - 1) // CHECKPOINT, N, N)


def forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None, save: bool,
    variant: str | None = None, threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states that backward needs (empty unless `save`)."""
    B, T, H, N = r.shape
    check_head(N)
    y = new(r)
    final_state = new(torch.empty(B, H, N, N, dtype=torch.promote_types(r.dtype, torch.float32)) if state is None else state)
    saved = new(final_state, saved_shape(r) if save else (0,))
    kernels.call(
        "forward", DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r, log_w, k, v, a, b, state, reset, y, final_state, saved if save else None, variant=variant, threads=threads,
    )  # fmt: skip
    return y, final_state, saved


def backward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, reset: Tensor | None, saved: Tensor, gy: Tensor,
    gfinal: Tensor | None, variant: str | None = None, threads: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of r, log_w, k, v, a, b and state from those of y and of the final state."""
    B, T, H, N = r.shape
    gradients = [new(x) for x in (r, log_w, k, v, a, b)]
    gstate = new(saved, (B, H, N, N))
    kernels.call(
        "backward", DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r, log_w, k, v, a, b, reset, saved, gy, gfinal, *gradients, gstate, variant=variant, threads=threads,
    )  # fmt: skip
    return *gradients, gstate
