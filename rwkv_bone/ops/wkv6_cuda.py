"""The WKV6 CUDA kernels of cuda/, built on first use for the GPU at hand and called through ctypes.

`choose` picks between two: "chunk" (cuda/wkv6_chunk.cu, tensor cores: bfloat16 and heads of 64, all that the RWKV-6 World
models need) and "sequential" (cuda/wkv6_sequential.cu: float32 too, heads up to 128). `forward` and `backward` take
contiguous CUDA tensors whose shapes and dtypes `rwkv_bone.ops.wkv6` has checked, run on the current stream, and say once
which kernel runs.
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from . import build

CHUNK = 16  # tokens; L in cuda/wkv6_chunk.cu
CHECKPOINT = (64 * 64 + 16 * 16) // 2  # float32 numbers kept a chunk for backward; sizeof(Checkpoint) there
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver: what nvcc links needs a driver of its own version


def choose(dtype: torch.dtype, N: int) -> str:
    """The kernel for r, k, v of `dtype` and heads of `N` channels."""
    if dtype not in DTYPES or N > 128:
        raise ValueError(
            f"wkv6: the CUDA kernels take float32 or bfloat16 and heads of up to 128 channels, not {dtype} and {N}; "
            f"use op='torch'"
        )
    return "chunk" if dtype == torch.bfloat16 and N == 64 else "sequential"


def describe(dtype: torch.dtype, N: int) -> str:
    return f"CUDA kernel, {choose(dtype, N)}"


# ---- building and calling


def nvcc() -> str:
    """The path of nvcc: in $CUDA_HOME, on PATH, in the usual folder, or where PyPI's nvidia-cuda-nvcc puts it."""
    folders = [Path("/usr/local/cuda/bin")]
    if os.environ.get("CUDA_HOME"):
        folders.insert(0, Path(os.environ["CUDA_HOME"], "bin"))
    else:
        folders = [Path(folder) for folder in os.environ.get("PATH", "").split(os.pathsep) if folder] + folders
    if nvidia := importlib.util.find_spec("nvidia"):
        folders += [bin for folder in nvidia.submodule_search_locations or () for bin in Path(folder).glob("cu*/bin")]
    if path := shutil.which("nvcc", path=os.pathsep.join(map(str, folders))):
        return path
    version = torch.version.cuda or "13.0"
    if version.startswith("12."):  # PyPI's package for CUDA 12 lacks nvcc itself
        cure = f"install the CUDA {version} toolkit (or conda install -c nvidia cuda-toolkit={version})"
    else:  # all three: they must be of one version
        packages = ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt")
        cure = "pip install " + " ".join(f"'{package}=={version}.*'" for package in packages)
    raise UserError(
        "the CUDA kernels need nvcc, and it is not in $CUDA_HOME, on PATH or in /usr/local/cuda: "
        f"{cure}, {build.WITHOUT_COMPILER}"
    )


def build_library(name: str, capability: tuple[int, int], cache: Path | None = None) -> Path:
    """The shared library of cuda/`name`.cu for GPUs of that compute capability, built if it is not cached."""
    if capability < (8, 0):
        raise UserError(
            f"the CUDA kernels need a GPU of compute capability 8.0 (Ampere) or newer, and this one has "
            f"{capability[0]}.{capability[1]}; use --op torch"
        )
    cuda = build.source_dir()
    return build.build(
        name, [build.Object(cuda / f"{name}.cu")], nvcc(), headers=sorted(cuda.glob("*.cuh")),
        flags=("-O3", "-std=c++17", "-arch=sm_{}{}".format(*capability), "-Xcompiler", "-fPIC"), cache=cache,
    )  # fmt: skip


@functools.cache
def load_kernel(name: str, capability: tuple[int, int]) -> ctypes.CDLL:
    """The library of cuda/`name`.cu, loaded."""
    return build.load(build_library(name, capability))


def library(kernel: str, device: torch.device) -> ctypes.CDLL:
    return declare(load_kernel(f"wkv6_{kernel}", torch.cuda.get_device_capability(device)))


def declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """Give the functions of cuda/wkv6_*.cu that `lib` has their C types."""
    c_int, size, pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
    functions = {
        "wkv6_sequential_scratch": (size, [size] * 4),
        "wkv6_sequential_forward": (c_int, [c_int] * 2 + [size] * 4 + [pointer] * 9),
        "wkv6_sequential_backward": (c_int, [c_int] * 2 + [size] * 4 + [pointer] * 16),
        "wkv6_chunk_checkpoint_bytes": (size, [size] * 3),
        "wkv6_chunk_scratch_bytes": (size, [size] * 2 + [c_int]),
        "wkv6_chunk_segments": (c_int, [size] * 3 + [c_int]),
        "wkv6_chunk_forward": (c_int, [c_int] + [size] * 3 + [pointer] * 10 + [c_int, pointer]),
        "wkv6_chunk_backward": (c_int, [c_int] + [size] * 3 + [pointer] * 15 + [c_int, pointer]),
    }
    for name, (restype, argtypes) in functions.items():
        if hasattr(lib, name):
            getattr(lib, name).restype, getattr(lib, name).argtypes = restype, argtypes
    return lib


def run(function, device: torch.device, *arguments) -> None:
    """Call a launching function: on `device` and its current stream, tensors as addresses, an error code as an exception.

    The libraries hold a CUDA runtime of their own (nvcc's default), which works in torch's context and on its streams.
    """
    addresses = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
    with torch.cuda.device(device):
        code = function(*addresses, torch.cuda.current_stream(device).cuda_stream)
    if code == DRIVER_TOO_OLD:
        raise UserError(
            f"the CUDA kernels were built by {nvcc()}, which is newer than this GPU's driver: set CUDA_HOME to a toolkit of "
            f"CUDA {torch.version.cuda}, which torch runs with, or update the driver, {build.WITHOUT_COMPILER}"
        )
    if code != 0:
        raise torch.cuda.CudaError(code)


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _announce(kernel: str, dtype: torch.dtype, N: int) -> None:
    print(f"rwkv-bone: wkv6 runs the {kernel} CUDA kernel ({dtype}, heads of {N})".replace("torch.", ""), file=sys.stderr)


# ---- the interface of a device's kernels, as rwkv_bone.ops.wkv6 uses it


def saved_shape(r: Tensor, kernel: str | None = None) -> tuple[int, ...]:
    """The shape of what forward keeps for backward: checkpoints (chunk), the initial state (sequential)."""
    B, T, H, N = r.shape
    if (kernel or choose(r.dtype, N)) == "chunk":
        return (B, H, (T + CHUNK - 1) // CHUNK, CHECKPOINT)
    return (B, H, N, N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, log_w: Tensor, u: Tensor, state: Tensor | None, save: bool, kernel: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and what backward needs (empty unless `save`). `kernel`: for tests; else as chosen."""
    B, T, H, N = r.shape
    kernel = kernel or choose(r.dtype, N)
    _announce(kernel, r.dtype, N)
    lib = library(kernel, r.device)
    y, final_state = torch.empty_like(r), u.new_empty(B, H, N, N)
    if kernel == "chunk":
        saved = u.new_empty(saved_shape(r, kernel) if save else 0)
        segments, scratch = _segments(lib, r)
        assert saved.nbytes in (0, lib.wkv6_chunk_checkpoint_bytes(B, T, H))
        run(
            lib.wkv6_chunk_forward, r.device, DTYPES[log_w.dtype], B, T, H,
            *map(_aligned, (r, k, v, log_w, u, state)), y, final_state, saved if save else None, scratch, segments,
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
    kernel = kernel or choose(r.dtype, N)
    lib = library(kernel, r.device)
    gr, gk, gv, gw = torch.empty_like(r), torch.empty_like(k), torch.empty_like(v), torch.empty_like(log_w)
    gu, gstate = u.new_empty(B, H, N), u.new_empty(B, H, N, N)
    if kernel == "chunk":
        segments, scratch = _segments(lib, r)
        run(
            lib.wkv6_chunk_backward, r.device, DTYPES[log_w.dtype], B, T, H,
            *map(_aligned, (r, k, v, log_w, u, saved, gy, gfinal)), gr, gk, gv, gw, gu, gstate, scratch, segments,
        )  # fmt: skip
    else:
        scratch = u.new_empty(lib.wkv6_sequential_scratch(B, T, H, N) // 4)
        run(
            lib.wkv6_sequential_backward, r.device, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N,
            r, k, v, log_w, u, saved, gy, gfinal, gr, gk, gv, gw, gu, gstate, scratch,
        )  # fmt: skip
    return gr, gk, gv, gw, gu.sum(0), gstate


def _segments(lib: ctypes.CDLL, r: Tensor) -> tuple[int, Tensor]:
    """Into how many segments of T the chunk kernel should cut r, and its scratch memory for that."""
    B, T, H, _ = r.shape
    segments = lib.wkv6_chunk_segments(B, T, H, multiprocessors(r.device))
    return segments, r.new_empty(lib.wkv6_chunk_scratch_bytes(B, H, segments), dtype=torch.uint8)


def _aligned(x: Tensor | None) -> Tensor | None:
    """x at an address that 16-byte loads take: a copy where x is a view into the middle of something."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()
