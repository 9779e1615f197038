"""The WKV7 CPU kernel of cpp/wkv7_cpu.cpp, built on first use and called through ctypes.

`forward` and `backward` take contiguous CPU tensors whose shapes and dtypes the caller has checked: r, k, v, a, b, y and their
gradients (B, T, H, N) in float32, bfloat16 or float64, N at most 128; log_w and its gradient the same, or float32; states
(B, H, N, N), indexed [value, key], float32 (float64 for float64); reset (B, T) bool, True at a token before which the state
becomes zero. Over any 16 tokens log_w may sum to -87 at the least (the model's is at least -0.607 a token).
"""

import ctypes
import functools
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...terminal import counted
from .. import build
from ..wkv6_cpu import DTYPES, VARIANT_FLAGS, VARIANTS, torch_threads

CHECKPOINT = 64  # tokens between the states that forward keeps for backward; kCheckpoint in cpp/wkv7_cpu.h


def source_dir() -> Path:
    return build.source_dir().parent / "cpp"


def build_library(cache: Path | None = None) -> Path:
    cpp = source_dir()
    names = VARIANTS if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    source = cpp / "wkv7_cpu.cpp"
    objects = [build.Object(cpp / "cpu.cpp"), build.Object(source)]
    objects += [build.Object(source, (f"-DWKV7_VARIANT={name}", *VARIANT_FLAGS[name])) for name in names]
    return build.build(
        "wkv7_cpu", objects, build.cxx_compiler(),
        headers=[cpp / name for name in ("cpu.h", "vectors.h", "wkv7_cpu.h", "wkv7_cpu_kernel.h")],
        flags=("-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=fast"),
        link_flags=("-shared", "-pthread"), cache=cache,
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    lib = build.load(build_library())
    head: list[Any] = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4]
    lib.wkv7_cpu_forward.argtypes = head + [ctypes.c_void_p] * 11
    lib.wkv7_cpu_backward.argtypes = head + [ctypes.c_void_p] * 17
    lib.wkv7_cpu_forward.restype = lib.wkv7_cpu_backward.restype = None
    return lib


@functools.cache
def variants() -> list[str]:
    """The instruction sets that this machine can run, the fastest last."""
    return [name for name, number in VARIANTS.items() if library().wkv7_cpu_has(number)]


def new(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory for a result, of which the kernel writes every element and nothing beside it."""
    return torch.empty(shape, dtype=dtype)


def describe(dtype: torch.dtype, N: int) -> str:
    variant = "portable" if dtype == torch.float64 else variants()[-1]
    return f"C++ kernel, {variant}, {counted(torch.get_num_threads(), 'thread')}"


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
    y = new(r.shape, r.dtype)
    state_dtype = torch.float64 if r.dtype == torch.float64 else torch.float32
    final_state = new((B, H, N, N), state_dtype)
    saved = new(saved_shape(r) if save else (0,), state_dtype)
    library().wkv7_cpu_forward(
        VARIANTS[variant or variants()[-1]], threads or torch.get_num_threads(), torch_threads(),
        DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        *(x.data_ptr() for x in (r, log_w, k, v, a, b)),
        None if state is None else state.data_ptr(), None if reset is None else reset.data_ptr(),
        y.data_ptr(), final_state.data_ptr(), saved.data_ptr() if save else None,
    )  # fmt: skip
    return y, final_state, saved


def backward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, reset: Tensor | None, saved: Tensor, gy: Tensor,
    gfinal: Tensor | None, variant: str | None = None, threads: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of r, log_w, k, v, a, b and state from those of y and of the final state."""
    B, T, H, N = r.shape
    gradients = [new(x.shape, x.dtype) for x in (r, log_w, k, v, a, b)]
    gstate = new((B, H, N, N), saved.dtype)
    library().wkv7_cpu_backward(
        VARIANTS[variant or variants()[-1]], threads or torch.get_num_threads(), torch_threads(),
        DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        *(x.data_ptr() for x in (r, log_w, k, v, a, b)),
        None if reset is None else reset.data_ptr(), saved.data_ptr(),
        gy.data_ptr(), None if gfinal is None else gfinal.data_ptr(),
        *(x.data_ptr() for x in gradients), gstate.data_ptr(),
    )  # fmt: skip
    return *gradients, gstate
