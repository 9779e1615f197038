"""Compiles a .cu file for the CPU (cuda_shim.h), and what the tests of such kernels share: inputs, truth, guarded tensors."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rwkv_bone.ops.wkv6 import wkv6_reference

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


DECAYS = {"none": None, "normal": (-6.0, -0.5), "strong": (-6.0, 3.0), "extreme": (-6.0, 5.0)}  # ranges of log(-log_w)


def make_log_w(decay: str, shape: tuple[int, ...]) -> Tensor:
    """Random log-decays a step: none (0), normal (to -0.6), strong (to -20), extreme (to -148)."""
    if DECAYS[decay] is None:
        return torch.zeros(shape)
    low, high = DECAYS[decay]
    return -torch.exp(torch.rand(shape) * (high - low) + low)


def make_inputs(B, T, H, N, decay="normal", dtype=torch.float32, w_dtype=None, state=True, seed=0):
    """Random (r, k, v, log_w, u, state), and the gradients of y and of the final state; without `state`, None for both."""
    torch.manual_seed(seed)
    r, k, v, gy = (torch.randn(B, T, H, N).to(dtype) for _ in range(4))
    log_w = make_log_w(decay, (B, T, H, N)).to(w_dtype or dtype)
    u, s, g_final = torch.randn(H, N), torch.randn(B, H, N, N), torch.randn(B, H, N, N)
    return (r, k, v, log_w, u, s if state else None), gy, g_final if state else None


def reference(inputs, gy, g_final) -> dict[str, Tensor]:
    """What wkv6_reference gives in float64: y, final_state, and the gradients g_r, g_k, g_v, g_log_w, g_u, g_state."""
    names = ["r", "k", "v", "log_w", "u", "state"]
    leaves = {name: x.double().requires_grad_() for name, x in zip(names, inputs) if x is not None}
    y, final_state = wkv6_reference(*leaves.values())
    loss = (y * gy).sum() + (final_state * (0 if g_final is None else g_final)).sum()
    grads = torch.autograd.grad(loss, leaves.values())
    return {"y": y.detach(), "final_state": final_state.detach(), **{f"g_{n}": g for n, g in zip(leaves, grads)}}


def error(got: Tensor, want: Tensor) -> float:
    """Relative L2 error. Where nothing is wanted, the norm of what came."""
    norm = want.norm().item()
    return (got.double() - want).norm().item() / (norm if norm > 0 else 1.0)
