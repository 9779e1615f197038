"""The WKV6 CPU kernel of cuda/wkv6_cpu.cpp, built (with Bone's of cuda/bone_cpu.cpp) on first use and called through ctypes.

`forward` and `backward` take contiguous CPU tensors whose shapes and dtypes `rwkv_bone.ops.wkv6` has checked.
"""

import ctypes
import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..terminal import counted
from . import build

CHECKPOINT = 128  # tokens between the states that forward keeps for backward; kCheckpoint in cuda/wkv6_cpu.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
VARIANTS = {"portable": 0, "avx2": 1, "avx512": 2}  # in order of speed
VARIANT_FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"),
}


def build_library(cache: Path | None = None) -> Path:
    cuda = build.source_dir()
    variants = VARIANTS if platform.machine() in ("x86_64", "AMD64") else ("portable",)
    objects = []
    for source, macro in ((cuda / "wkv6_cpu.cpp", "WKV6_VARIANT"), (cuda / "bone_cpu.cpp", "BONE_VARIANT")):
        objects.append(build.Object(source))
        objects += [build.Object(source, (f"-D{macro}={name}", *VARIANT_FLAGS[name])) for name in variants]
    return build.build(
        "wkv6_cpu", objects, build.cxx_compiler(),
        headers=[cuda / "wkv6_cpu.h", cuda / "wkv6_cpu_kernel.h"],
        flags=("-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=fast"),
        link_flags=("-shared", "-pthread"), cache=cache,
    )  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    lib = build.load(build_library())
    head: list[Any] = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4]
    lib.wkv6_cpu_forward.argtypes = head + [ctypes.c_void_p] * 9
    lib.wkv6_cpu_backward.argtypes = head + [ctypes.c_void_p] * 14
    lib.bone_cpu_forward.argtypes = head + [ctypes.c_void_p] * 4
    lib.bone_cpu_backward.argtypes = head + [ctypes.c_void_p] * 5 + [ctypes.c_int64, ctypes.c_int64, ctypes.c_int]
    for function in (lib.wkv6_cpu_forward, lib.wkv6_cpu_backward, lib.bone_cpu_forward, lib.bone_cpu_backward):
        function.restype = None
    return lib


@functools.cache
def variants() -> list[str]:
    """The instruction sets that this machine can run, the fastest last."""
    return [name for name, number in VARIANTS.items() if library().wkv6_cpu_has(number)]


@functools.cache
def torch_threads() -> int | None:
    """The address of GOMP_parallel in the OpenMP that torch runs on: one pool of threads, not two that fight for cores.

    None where torch has another kind of threads; then the kernel starts its own.
    """
    try:
        torch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        return ctypes.cast(torch_cpu.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


@functools.cache
def variant_number(name: str | None) -> int:
    name = name or variants()[-1]
    if name not in variants():
        raise ValueError(f"this machine has no {name}: choose among {', '.join(variants())}")
    return VARIANTS[name]


def describe(dtype: torch.dtype, N: int) -> str:
    return f"C++ kernel, {variants()[-1]}, {counted(torch.get_num_threads(), 'thread')}"


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
    library().wkv6_cpu_forward(
        variant_number(variant), threads or torch.get_num_threads(), torch_threads(),
        DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r.data_ptr(), k.data_ptr(), v.data_ptr(), log_w.data_ptr(), u.data_ptr(),
        None if state is None else state.data_ptr(),
        y.data_ptr(), final_state.data_ptr(), saved.data_ptr() if save else None,
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
    library().wkv6_cpu_backward(
        variant_number(variant), threads or torch.get_num_threads(), torch_threads(),
        DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r.data_ptr(), k.data_ptr(), v.data_ptr(), log_w.data_ptr(), u.data_ptr(), saved.data_ptr(),
        gy.data_ptr(), None if gfinal is None else gfinal.data_ptr(),
        gr.data_ptr(), gk.data_ptr(), gv.data_ptr(), gw.data_ptr(), gu.data_ptr(), gstate.data_ptr(),
    )  # fmt: skip
    return gr, gk, gv, gw, gu, gstate
