"""What the CUDA kernels of cuda/ share on the Python side: nvcc, building for the GPU at hand, and calls through ctypes."""

import ctypes
import functools
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from . import build

DTYPES = {torch.float32: 0, torch.bfloat16: 1}
CHUNK = 16  # tokens; L in cuda/tiles.cuh
DRIVER_TOO_OLD = 35  # cudaErrorInsufficientDriver: what nvcc links needs a driver of its own version
INT, SIZE, POINTER = ctypes.c_int, ctypes.c_int64, ctypes.c_void_p
Functions = dict[str, tuple[Any, Sequence[Any]]]  # the types of what C functions return and take, by name
refused: set[tuple[str, str, torch.dtype, int]] = set()  # recurrence, kernel, dtype, N: what selfcheck.py found unfit here


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
    if torch.version.hip:
        raise UserError("the CUDA kernels are for NVIDIA GPUs, and this torch is built for ROCm")
    least = (8, 0) if name.endswith("chunk") else (7, 5)  # tensor cores for bf16, copies behind the program's back
    if capability < least:
        raise UserError(
            f"needs a GPU of compute capability {least[0]}.{least[1]} ({'Ampere' if least[0] == 8 else 'Turing'}) or newer, and "
            f"this one has {capability[0]}.{capability[1]}, {build.WITHOUT_COMPILER}"
        )
    return build.build(
        name, [build.Object(build.source(f"cuda/{name}.cu"))], nvcc(),
        flags=("-O3", "-std=c++17", "-arch=sm_{}{}".format(*capability), "-Xcompiler", "-fPIC"), cache=cache,
    )  # fmt: skip


@functools.cache
def load(name: str, capability: tuple[int, int]) -> ctypes.CDLL:
    """The library of cuda/`name`.cu, loaded."""
    return build.load(build_library(name, capability))


def declare(lib: ctypes.CDLL, functions: Functions) -> ctypes.CDLL:
    """Give those of `functions` that `lib` has their C types."""
    for name, (restype, argtypes) in functions.items():
        if hasattr(lib, name):
            getattr(lib, name).restype, getattr(lib, name).argtypes = restype, argtypes
    return lib


def choose(name: str, dtype: torch.dtype, N: int, T: int = CHUNK) -> str:
    """Of the two kernels of the recurrence `name`, the one for T tokens of `dtype` and heads of N channels; ValueError for none.

    Tokens that fill no chunk go step by step: that is less work, and exact where the few numbers of a result cancel."""
    if dtype not in DTYPES or N > 128:
        raise ValueError(
            f"{name}: the CUDA kernels take float32 or bfloat16 and heads of up to 128 channels, not {dtype} and {N}; "
            f"use op='torch'"
        )
    fits = dtype == torch.bfloat16 and N == 64 and T >= CHUNK and (name, "chunk", dtype, N) not in refused
    return "chunk" if fits else "sequential"


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


def segments(name: str, lib: ctypes.CDLL, r: Tensor) -> tuple[Tensor, int]:
    """Into how many segments of T the chunk kernel of the recurrence `name` should cut r (B, T, H, N), behind its scratch memory
    for that."""
    B, T, H, _ = r.shape
    number = getattr(lib, f"{name}_chunk_segments")(B, T, H, multiprocessors(r.device))
    return r.new_empty(getattr(lib, f"{name}_chunk_scratch_bytes")(B, H, number), dtype=torch.uint8), number


def multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class RecurrenceKernels:
    """The two kernels of a recurrence (ops/recurrence.py), built on first use for the GPU at hand: cuda/NAME_chunk.cu, by tensor
    cores, for bfloat16 and heads of 64, and cuda/NAME_sequential.cu, for float32 too and heads of up to 128 channels. They take
    contiguous tensors that `Recurrence` has checked, and run on the current stream. The inputs before the state have gradients.

    names       of the inputs, in the op's order
    checkpoint  float32 numbers that the chunk kernel keeps of each chunk for backward; sizeof(Checkpoint) there
    """

    def __init__(self, name: str, names: Sequence[str], checkpoint: int):
        self.name, self.checkpoint = name, checkpoint
        n, self.state, self.log_w = len(names), names.index("state"), names.index("log_w")
        sizes: list[Any] = [SIZE] * 3  # B, T, H
        self.functions: Functions = {
            f"{name}_sequential_scratch": (SIZE, [*sizes, SIZE]),
            f"{name}_sequential_forward": (INT, [INT, INT, *sizes, SIZE, *[POINTER] * (n + 3)]),
            f"{name}_sequential_backward": (INT, [INT, INT, *sizes, SIZE, *[POINTER] * (n + self.state + 5)]),
            f"{name}_chunk_checkpoint_bytes": (SIZE, sizes),
            f"{name}_chunk_scratch_bytes": (SIZE, [SIZE, SIZE, INT]),
            f"{name}_chunk_segments": (INT, [*sizes, INT]),
            f"{name}_chunk_forward": (INT, [INT, *sizes, *[POINTER] * (n + 4), INT, POINTER]),
            f"{name}_chunk_backward": (INT, [INT, *sizes, *[POINTER] * (n + self.state + 4), INT, POINTER]),
        }

    def choose(self, dtype: torch.dtype, N: int, T: int = CHUNK) -> str:
        """The kernel for T tokens of `dtype` and heads of N channels."""
        return choose(self.name, dtype, N, T)

    def library(self, kernel: str, device: torch.device) -> ctypes.CDLL:
        return declare(load(f"{self.name}_{kernel}", torch.cuda.get_device_capability(device)), self.functions)

    def saved_shape(self, r: Tensor, kernel: str | None = None) -> tuple[int, ...]:
        """The shape of what forward keeps for backward: checkpoints (chunk), the initial state (sequential)."""
        B, T, H, N = r.shape
        if (kernel or self.choose(r.dtype, N, T)) == "chunk":
            return (B, H, (T + CHUNK - 1) // CHUNK, self.checkpoint)
        return (B, H, N, N)

    def forward(self, *inputs: Tensor | None, save: bool, kernel: str | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """y, the final state, and what backward needs (empty unless `save`). `kernel`: for tests; else as chosen."""
        r, log_w, state = inputs[0], inputs[self.log_w], inputs[self.state]
        assert r is not None and log_w is not None
        B, T, H, N = r.shape
        kernel = kernel or self.choose(r.dtype, N, T)
        lib = self.library(kernel, r.device)
        function = getattr(lib, f"{self.name}_{kernel}_forward")
        y, final_state = torch.empty_like(r), float32(r, B, H, N, N)
        if kernel == "chunk":
            saved = float32(r, *(self.saved_shape(r, kernel) if save else (0,)))
            assert saved.nbytes in (0, getattr(lib, f"{self.name}_chunk_checkpoint_bytes")(B, T, H))
            results = (y, final_state, saved if save else None, *segments(self.name, lib, r))
            run(function, r.device, DTYPES[log_w.dtype], B, T, H, *map(aligned, inputs), *results)
        else:
            run(function, r.device, DTYPES[r.dtype], DTYPES[log_w.dtype], B, T, H, N, *inputs, y, final_state)
            saved = float32(r, 0)
            if save:
                saved = torch.zeros_like(final_state) if state is None else state.clone()
        return y, final_state, saved

    def backward(self, *tensors: Tensor | None, kernel: str | None = None) -> tuple[Tensor, ...]:
        """The gradients of the inputs up to the state. tensors: the inputs but the state, what forward kept, and the gradients
        of y and of the final state (None: zeros)."""
        *inputs, saved, gy, gfinal = tensors
        r, log_w = inputs[0], inputs[self.log_w]
        assert r is not None and log_w is not None
        B, T, H, N = r.shape
        kernel = kernel or self.choose(r.dtype, N, T)
        lib = self.library(kernel, r.device)
        function = getattr(lib, f"{self.name}_{kernel}_backward")
        # of an input that all rows share, each row gives a part
        own = [x for x in inputs[: self.state] if x is not None]
        gradients = [float32(r, B, *x.shape) if x.dim() == 2 else torch.empty_like(x) for x in own]
        gradients.append(float32(r, B, H, N, N))
        if kernel == "chunk":
            rest = (*gradients, *segments(self.name, lib, r))
            run(function, r.device, DTYPES[log_w.dtype], B, T, H, *map(aligned, tensors), *rest)
        else:
            inputs.insert(self.state, saved)
            scratch = float32(r, getattr(lib, f"{self.name}_sequential_scratch")(B, T, H, N) // 4)
            dtypes = DTYPES[r.dtype], DTYPES[log_w.dtype]
            run(function, r.device, *dtypes, B, T, H, N, *inputs, gy, gfinal, *gradients, scratch)
        return tuple(g.sum(0) if g.dim() == 3 else g for g in gradients)


def float32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def aligned(x: Tensor | None) -> Tensor | None:
    """x at an address that 16-byte loads take: a copy where x is a view into the middle of something."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()
