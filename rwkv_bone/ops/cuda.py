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


def aligned(x: Tensor | None) -> Tensor | None:
    """x at an address that 16-byte loads take: a copy where x is a view into the middle of something."""
    return x if x is None or x.data_ptr() % 16 == 0 else x.clone()
