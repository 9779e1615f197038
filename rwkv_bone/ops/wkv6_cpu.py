"""The WKV6 CPU kernel of cuda/wkv6_cpu.cpp, built on first use and called through ctypes.

`forward` and `backward` take contiguous CPU tensors whose shapes and dtypes `rwkv_bone.ops.wkv6` has checked.
"""

import ctypes
import functools

import torch
from torch import Tensor

from rwkv_bone.ops import build

CHECKPOINT = 128  # tokens between the states that forward keeps for backward; kCheckpoint in cuda/wkv6_cpu.cpp
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


@functools.cache
def library() -> ctypes.CDLL:
    source = build.source_dir() / "wkv6_cpu.cpp"
    flags = ("-O3", "-std=c++17", "-fPIC")
    lib = build.load(build.build("wkv6_cpu", [build.Object(source)], build.cxx_compiler(), flags=flags))
    head = [ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int, *[ctypes.c_int64] * 4]
    lib.wkv6_cpu_forward.argtypes = head + [ctypes.c_void_p] * 9
    lib.wkv6_cpu_backward.argtypes = head + [ctypes.c_void_p] * 14
    return lib


def saved_shape(B: int, T: int, H: int, N: int) -> tuple[int, ...]:
    """The shape of the states that forward keeps for backward: one every CHECKPOINT tokens, the initial one first."""
    return (B, H, (T + CHECKPOINT - 1) // CHECKPOINT, N, N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states that backward needs (empty unless `save`)."""
    B, T, H, N = r.shape
    y = torch.empty_like(r)
    final_state = u.new_empty(B, H, N, N)
    saved = u.new_empty(saved_shape(B, T, H, N) if save else 0)
    library().wkv6_cpu_forward(
        -1, torch.get_num_threads(), None, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r.data_ptr(), k.data_ptr(), v.data_ptr(), log_w.data_ptr(), u.data_ptr(),
        None if state is None else state.data_ptr(),
        y.data_ptr(), final_state.data_ptr(), saved.data_ptr() if save else None,
    )  # fmt: skip
    return y, final_state, saved


def backward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, saved: Tensor, gy: Tensor, gfinal: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of r, k, v, log_w, u and state from those of y and of the final state."""
    B, T, H, N = r.shape
    gr, gk, gv, gw = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v), torch.empty_like(log_w)
    gu, gstate = torch.empty_like(u), u.new_empty(B, H, N, N)
    library().wkv6_cpu_backward(
        -1, torch.get_num_threads(), None, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
        r.data_ptr(), k.data_ptr(), v.data_ptr(), log_w.data_ptr(), u.data_ptr(), saved.data_ptr(),
        gy.data_ptr(), None if gfinal is None else gfinal.data_ptr(),
        gr.data_ptr(), gk.data_ptr(), gv.data_ptr(), gw.data_ptr(), gu.data_ptr(), gstate.data_ptr(),
    )  # fmt: skip
    return gr, gk, gv, gw, gu, gstate
