"""How matrices of float32 are multiplied: a choice that torch leaves to its user.

On the CPU torch has two libraries and takes MKL, which on AMD processors makes no use of AVX-512; oneDNN does, and is twice as
fast there (Zen 5). Torch goes to oneDNN where "medium" precision is allowed, by which it means products of bf16 on a processor
with AMX. On one without, they are float32 as before; that is tried out here on a product, not taken on trust.
"""

import functools
import platform
from pathlib import Path

import torch

FEW = 256  # tokens: for fewer MKL is the faster, as it takes less time to begin


def set_matmul_backend(device: str, tokens: int, tf32: bool = False) -> str:
    """Choose for this process, by `device` "cpu" or "cuda", the tokens that are worked on at once, and whether TF32 will do.

    Says what it was in a word for people, or "" where it is torch's own choice.
    """
    if device == "cuda":
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        return ""
    onednn = tokens >= FEW and onednn_is_right()
    torch.set_float32_matmul_precision("medium" if onednn else "highest")
    return "oneDNN" if onednn else ""


@functools.cache
def onednn_is_right() -> bool:
    """Whether this is an AMD processor with AVX-512 on which oneDNN multiplies in full float32."""
    if not (amd() and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"):
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        return error_of_a_product() < 1e-6  # of bf16 it would be 2e-3
    finally:
        torch.set_float32_matmul_precision(before)


def error_of_a_product() -> float:
    """The relative error of the product of two float32 matrices."""
    a, b = torch.randn(2, 256, 256, generator=torch.Generator().manual_seed(0))
    exact = a.double() @ b.double()
    return ((a @ b - exact).norm() / exact.norm()).item()


def amd() -> bool:
    info = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (info.read_text() if info.exists() else platform.processor())
