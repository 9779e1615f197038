"""nvcc: where it is found, what is said where it is not, and that it builds every kernel."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.ops import cuda, wkv6, wkv7


def test_without_nvcc_it_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(cuda.shutil, "which", lambda *args, **kwargs: None)
    for version, cure in [("13.0", r"pip install 'nvidia-cuda-nvcc==13\.0\.\*'"), ("12.8", "install the CUDA 12.8 toolkit")]:
        monkeypatch.setattr(torch.version, "cuda", version)
        with pytest.raises(UserError, match=rf"need nvcc.*: {cure}.*, or use --op torch"):
            cuda.nvcc()


def test_nvcc_is_taken_from_cuda_home_before_path(monkeypatch, tmp_path):
    for folder in ("home/bin", "path"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert cuda.nvcc() == str(tmp_path / "path" / "nvcc")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda.nvcc() == str(tmp_path / "home" / "bin" / "nvcc")


def test_a_driver_older_than_nvcc_is_told_with_what_to_do(monkeypatch):
    monkeypatch.setattr(cuda, "nvcc", lambda: "/opt/cuda-14/bin/nvcc")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
    insufficient_driver = 35
    with pytest.raises(UserError, match=r"/opt/cuda-14/bin/nvcc, which is newer than.*CUDA_HOME to a toolkit of CUDA 12\.8"):
        cuda.run(lambda *arguments: insufficient_driver, torch.device("cuda:0"))


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["sequential", "chunk"])
@pytest.mark.parametrize("kernels", [wkv6.cuda, wkv7.cuda], ids=["wkv6", "wkv7"])
def test_nvcc_builds_a_library_that_loads(kernels, kernel, tmp_path):
    try:
        cuda.nvcc()
    except UserError as absent:
        pytest.skip(str(absent))
    path = cuda.build_library(f"{kernels.name}_{kernel}", (8, 0), cache=tmp_path)
    lib = cuda.declare(ctypes.CDLL(str(path)), kernels.functions)
    forward, no_work = getattr(lib, f"{kernels.name}_{kernel}_forward"), 0
    arguments = [no_work if kind in (ctypes.c_int, ctypes.c_int64) else None for kind in forward.argtypes]
    assert forward(*arguments) == 1  # cudaErrorInvalidValue: no batch rows
