"""The WKV7 CUDA kernels of cuda/, built on first use for the GPU at hand and called through ctypes.

`choose` picks between two: "chunk" (cuda/wkv7_chunk.cu, tensor cores: bfloat16 and heads of 64, all that RWKV-7 models need)
and "sequential" (cuda/wkv7_sequential.cu: float32 too, heads up to 128). `forward` and `backward` take contiguous CUDA
tensors whose shapes and dtypes the caller has checked, and run on the current stream.

r, k, v, a, b and y are (B, T, H, N) of one dtype; log_w (B, T, H, N) of that dtype or float32; states (B, H, N, N) float32,
[value, key]; reset (B, T) bool, True at a token before which the state becomes zero. state, reset and gfinal may be None.
"""

import ctypes

import torch
from torch import Tensor

from .. import cuda
from ..cuda import CHUNK, DTYPES, INT, POINTER, SIZE, Functions, aligned, declare, load, run, segments

CHECKPOINT = (64 * 64 + 16 * 64) // 2  # float32 numbers kept a chunk for backward; sizeof(Checkpoint) in cuda/wkv7_chunk.cu
FUNCTIONS: Functions = {
    "wkv7_sequential_scratch": (SIZE, [SIZE] * 4),
    "wkv7_sequential_forward": (INT, [INT] * 2 + [SIZE] * 4 + [POINTER] * 11),
    "wkv7_sequential_backward": (INT, [INT] * 2 + [SIZE] * 4 + [POINTER] * 19),
    "wkv7_chunk_checkpoint_bytes": (SIZE, [SIZE] * 3),
    "wkv7_chunk_scratch_bytes": (SIZE, [SIZE] * 2 + [INT]),
    "wkv7_chunk_segments": (INT, [SIZE] * 3 + [INT]),
    "wkv7_chunk_forward": (INT, [INT] + [SIZE] * 3 + [POINTER] * 12 + [INT, POINTER]),
    "wkv7_chunk_backward": (INT, [INT] + [SIZE] * 3 + [POINTER] * 18 + [INT, POINTER]),
}


def choose(dtype: torch.dtype, N: int, T: int = CHUNK) -> str:
    """The kernel for T tokens of `dtype` and heads of N channels."""
    return cuda.choose("wkv7", dtype, N, T)


def library(kernel: str, device: torch.device) -> ctypes.CDLL:
    return declare(load(f"wkv7_{kernel}", torch.cuda.get_device_capability(device)), FUNCTIONS)


def saved_shape(r: Tensor, kernel: str | None = None) -> tuple[int, ...]:
    """The shape of what forward keeps for backward: checkpoints (chunk), the initial state (sequential)."""
    B, T, H, N = r.shape
    if (kernel or choose(r.dtype, N, T)) == "chunk":
        return (B, H, (T + CHUNK - 1) // CHUNK, CHECKPOINT)
    return (B, H, N, N)


def forward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None,
    save: bool, kernel: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and what backward needs (empty unless `save`). `kernel`: for tests; else as chosen."""
    B, T, H, N = r.shape
    kernel = kernel or choose(r.dtype, N, T)
    lib = library(kernel, r.device)
    y, final_state = torch.empty_like(r), _float32(r, B, H, N, N)
    if kernel == "chunk":
        saved = _float32(r, *(saved_shape(r, kernel) if save else (0,)))
        assert saved.nbytes in (0, lib.wkv7_chunk_checkpoint_bytes(B, T, H))
        run(
            lib.wkv7_chunk_forward, r.device, DTYPES[log_w.dtype], B, T, H,
            *map(aligned, (r, log_w, k, v, a, b, state, reset)), y, final_state, saved if save else None,
            *segments("wkv7", lib, r),
        )  # fmt: skip
    else:
        saved = _float32(r, 0) if not save else r.new_zeros(B, H, N, N, dtype=torch.float32) if state is None else state.clone()
        run(
            lib.wkv7_sequential_forward, r.device, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
            r, log_w, k, v, a, b, state, reset, y, final_state,
        )  # fmt: skip
    return y, final_state, saved


def backward(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, reset: Tensor | None, saved: Tensor, gy: Tensor,
    gfinal: Tensor | None, kernel: str | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The gradients of r, log_w, k, v, a, b and state from those of y and of the final state."""
    B, T, H, N = r.shape
    kernel = kernel or choose(r.dtype, N, T)
    lib = library(kernel, r.device)
    gr, glog_w, gk, gv, ga, gb = map(torch.empty_like, (r, log_w, k, v, a, b))
    grads = gr, glog_w, gk, gv, ga, gb, _float32(r, B, H, N, N)
    if kernel == "chunk":
        run(
            lib.wkv7_chunk_backward, r.device, DTYPES[log_w.dtype], B, T, H,
            *map(aligned, (r, log_w, k, v, a, b, reset, saved, gy, gfinal)), *grads, *segments("wkv7", lib, r),
        )  # fmt: skip
    else:
        scratch = _float32(r, lib.wkv7_sequential_scratch(B, T, H, N) // 4)
        run(
            lib.wkv7_sequential_backward, r.device, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
            r, log_w, k, v, a, b, saved, reset, gy, gfinal, *grads, scratch,
        )  # fmt: skip
    return grads


def _float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)
