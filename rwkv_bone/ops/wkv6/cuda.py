"""The WKV6 CUDA kernels of cuda/, built on first use for the GPU at hand and called through ctypes.

`choose` picks between two: "chunk" (cuda/wkv6_chunk.cu, tensor cores: bfloat16 and heads of 64, all that the RWKV-6 World
models need) and "sequential" (cuda/wkv6_sequential.cu: float32 too, heads up to 128). `forward` and `backward` take
contiguous CUDA tensors whose shapes and dtypes `rwkv_bone.ops.wkv6` has checked, and run on the current stream.
"""

import ctypes

import torch
from torch import Tensor

from .. import cuda
from ..cuda import CHUNK, DTYPES, INT, POINTER, SIZE, Functions, aligned, declare, load, run, segments

CHECKPOINT = (64 * 64 + 16 * 16) // 2  # float32 numbers kept a chunk for backward; sizeof(Checkpoint) there
FUNCTIONS: Functions = {
    "wkv6_sequential_scratch": (SIZE, [SIZE] * 4),
    "wkv6_sequential_forward": (INT, [INT] * 2 + [SIZE] * 4 + [POINTER] * 9),
    "wkv6_sequential_backward": (INT, [INT] * 2 + [SIZE] * 4 + [POINTER] * 16),
    "wkv6_chunk_checkpoint_bytes": (SIZE, [SIZE] * 3),
    "wkv6_chunk_scratch_bytes": (SIZE, [SIZE] * 2 + [INT]),
    "wkv6_chunk_segments": (INT, [SIZE] * 3 + [INT]),
    "wkv6_chunk_forward": (INT, [INT] + [SIZE] * 3 + [POINTER] * 10 + [INT, POINTER]),
    "wkv6_chunk_backward": (INT, [INT] + [SIZE] * 3 + [POINTER] * 15 + [INT, POINTER]),
}


def choose(dtype: torch.dtype, N: int, T: int = CHUNK) -> str:
    """The kernel for T tokens of `dtype` and heads of N channels."""
    return cuda.choose("wkv6", dtype, N, T)


def library(kernel: str, device: torch.device) -> ctypes.CDLL:
    return declare(load(f"wkv6_{kernel}", torch.cuda.get_device_capability(device)), FUNCTIONS)


def saved_shape(r: Tensor, kernel: str | None = None) -> tuple[int, ...]:
    """The shape of what forward keeps for backward: checkpoints (chunk), the initial state (sequential)."""
    B, T, H, N = r.shape
    if (kernel or choose(r.dtype, N, T)) == "chunk":
        return (B, H, (T + CHUNK - 1) // CHUNK, CHECKPOINT)
    return (B, H, N, N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, save: bool, kernel: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what backward needs (empty unless `save`). `kernel`: for tests; else as chosen."""
    B, T, H, N = r.shape
    kernel = kernel or choose(r.dtype, N, T)
    lib = library(kernel, r.device)
    y, final_state = torch.empty_like(r), u.new_empty(B, H, N, N)
    if kernel == "chunk":
        saved = u.new_empty(saved_shape(r, kernel) if save else 0)
        assert saved.nbytes in (0, lib.wkv6_chunk_checkpoint_bytes(B, T, H))
        run(
            lib.wkv6_chunk_forward, r.device, DTYPES[log_w.dtype], B, T, H,
            *map(aligned, (r, k, v, log_w, u, state)), y, final_state, saved if save else None, *segments("wkv6", lib, r),
        )  # fmt: skip
    else:
        saved = u.new_empty(0) if not save else u.new_zeros(B, H, N, N) if state is None else state.clone()
        run(
            lib.wkv6_sequential_forward, r.device, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
            r, k, v, log_w, u, state, y, final_state,
        )  # fmt: skip
    return y, final_state, saved


def backward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, saved: Tensor, gy: Tensor, gfinal: Tensor | None,
    kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of r, k, v, log_w, u and state from those of y and of the final state."""
    B, T, H, N = r.shape
    kernel = kernel or choose(r.dtype, N, T)
    lib = library(kernel, r.device)
    gr, gk, gv, gw = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v), torch.empty_like(log_w)
    gu, gstate = u.new_empty(B, H, N), u.new_empty(B, H, N, N)
    if kernel == "chunk":
        run(
            lib.wkv6_chunk_backward, r.device, DTYPES[log_w.dtype], B, T, H,
            *map(aligned, (r, k, v, log_w, u, saved, gy, gfinal)), gr, gk, gv, gw, gu, gstate,
            *segments("wkv6", lib, r),
        )  # fmt: skip
    else:
        scratch = u.new_empty(lib.wkv6_sequential_scratch(B, T, H, N) // 4)
        run(
            lib.wkv6_sequential_backward, r.device, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
            r, k, v, log_w, u, saved, gy, gfinal, gr, gk, gv, gw, gu, gstate, scratch,
        )  # fmt: skip
    return gr, gk, gv, gw, gu.sum(0), gstate
