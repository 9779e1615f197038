"""Compiles a .cu file for the CPU (cuda_shim.h), and guards the tensors that such kernels write."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

TESTS = Path(__file__).resolve().parent
CUDA = TESTS.parent / "cuda"
MARGIN = 64  # elements before and after a guarded tensor


def compile_for_cpu(source: Path, folder: Path, *flags: str, races: bool = False) -> Path:
    """The shared library made of `source` with the shim in place of CUDA. Warnings are errors. With `races`, a race on shared
    memory ends the process."""
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    library = folder / f"{source.stem}{'-races' * races}.so"
    # -ffp-contract=off: the same sums on every machine
    command = ["g++", "-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    command += ["-fPIC", *flags, f"-I{TESTS}", f"-I{CUDA}", "-x", "c++", str(source)]
    if not races:
        commands = [[*command, "-shared", "-o", str(library)]]
    else:  # the compiler's half of ThreadSanitizer alone: cuda_shim.h is the other
        compiled = str(library.with_suffix(".o"))
        command += ["-Og", "-fsanitize=thread", "-c", "-o", compiled]
        commands = [command, ["g++", "-shared", compiled, "-o", str(library)]]
    for command in commands:
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    return library


def pointer(x: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if x is None else x.data_ptr())


def guarded(x: Tensor) -> Tensor:
    """A copy of x with NaN before and after: reading beyond it shows in the result, writing in `assert_guards_intact`."""
    buffer = torch.full((x.numel() + 2 * MARGIN,), torch.nan, dtype=x.dtype, device=x.device)
    view = buffer[MARGIN : MARGIN + x.numel()].view(x.shape)
    return view.copy_(x)


def guarded_nan(shape: tuple[int, ...], dtype: torch.dtype, device="cpu") -> Tensor:
    """A guarded tensor for a kernel to fill: what it leaves out stays NaN."""
    return guarded(torch.full(shape, torch.nan, dtype=dtype, device=device))


def assert_guards_intact(*tensors: Tensor) -> None:
    for x in tensors:
        whole = x.as_strided((x.numel() + 2 * MARGIN,), (1,), x.storage_offset() - MARGIN)
        assert whole[:MARGIN].isnan().all() and whole[-MARGIN:].isnan().all(), "written beyond a tensor's end"


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error. Where nothing is wanted, the norm of what came."""
    norm = want.norm().item()
    return (got.double() - want).norm().item() / (norm if norm > 0 else 1.0)
