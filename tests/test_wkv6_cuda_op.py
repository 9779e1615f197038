"""The op's CUDA side without a GPU: its calls into both kernels, run on the CPU by the shim, and the build with nvcc."""

import contextlib
import ctypes
from types import SimpleNamespace

import pytest
import torch
from cuda_shim import CUDA, compile_for_cpu, error, make_log_w

from rwkv_bone.errors import UserError
from rwkv_bone.ops import cuda
from rwkv_bone.ops import wkv6 as op
from rwkv_bone.ops.wkv6 import cuda as wkv6_cuda
from rwkv_bone.ops.wkv6 import wkv6, wkv6_reference

FP32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kernels")
    names = ("sequential", "chunk")
    paths = {name: compile_for_cpu(CUDA / f"wkv6_{name}.cu", folder) for name in names}
    return {name: cuda.declare(ctypes.CDLL(str(path)), wkv6_cuda.functions) for name, path in paths.items()}


@pytest.fixture
def shim(libraries, monkeypatch):
    """CPU tensors go the way of CUDA tensors. Yields the set of the kernels that ran."""
    ran = set()

    def library(kernel, device):
        ran.add(kernel)
        return libraries[kernel]

    def run(function, device, *arguments):
        assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0

    monkeypatch.setattr(wkv6_cuda, "library", library)
    monkeypatch.setattr(cuda, "run", run)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 4)
    monkeypatch.setitem(op.recurrence.kernels, "cpu", wkv6_cuda)
    return ran


def make_inputs(dtype, w_dtype, T, N, B=2, H=3, seed=0):
    torch.manual_seed(seed)
    r, k, v = (torch.randn(B, T, H, N).to(dtype) for _ in range(3))
    log_w = make_log_w("normal", (B, T, H, N)).to(w_dtype)
    leaves = {"r": r, "k": k, "v": v, "log_w": log_w, "u": torch.randn(H, N), "state": torch.randn(B, H, N, N)}
    return {name: x.requires_grad_() for name, x in leaves.items()}


def loss(y, final_state, use):
    torch.manual_seed(1)
    parts = [(x.double() * torch.randn(x.shape)).sum() for x in (y, final_state)]
    return sum(part for part, wanted in zip(parts, use) if wanted)


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True)], ids=["both", "y", "final_state"])
@pytest.mark.parametrize("has_state", [True, False], ids=["state", "no_state"])
@pytest.mark.parametrize(
    "dtype, w_dtype, N, T, kernel",
    [
        (FP32, FP32, 8, 33, "sequential"),
        (FP32, FP32, 64, 17, "sequential"),
        (BF16, FP32, 32, 33, "sequential"),
        (BF16, BF16, 64, 33, "chunk"),
        (BF16, FP32, 64, 520, "chunk"),  # in two segments
    ],
)
def test_output_state_and_gradients_equal_the_reference(shim, dtype, w_dtype, N, T, kernel, has_state, use):
    inputs = make_inputs(dtype, w_dtype, T, N, *((1, 1) if T > 500 else ()))
    if not has_state:
        del inputs["state"]
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    got, want = wkv6(**inputs), wkv6_reference(**exact)
    assert shim == {kernel}
    assert got[0].dtype == dtype and got[1].dtype == FP32
    gate = 1e-6 if dtype == FP32 else 5e-3
    errors = {"y": error(got[0].detach(), want[0].detach()), "final_state": error(got[1].detach(), want[1].detach())}
    loss(*got, use).backward()
    loss(*want, use).backward()
    for name, x in exact.items():
        if x.grad is None:  # the final state knows neither r nor u
            assert inputs[name].grad is None or not inputs[name].grad.any()
        else:
            assert inputs[name].grad.dtype == inputs[name].dtype
            errors[name] = error(inputs[name].grad, x.grad)
    too_large = {name: x for name, x in errors.items() if not x <= gate}
    assert not too_large


@pytest.mark.parametrize("dtype, N", [(FP32, 8), (BF16, 64)])
def test_the_registered_op_is_sound(shim, dtype, N):
    arguments = make_inputs(dtype, dtype, 20, N).values()
    torch.library.opcheck(op.recurrence.op, (*arguments, True), test_utils=("test_schema", "test_faketensor"))


def test_tensors_in_the_middle_of_another_are_taken(shim):
    inputs = {name: x.detach() for name, x in make_inputs(BF16, BF16, 20, 64).items()}
    want = wkv6(**inputs)
    shifted = {}
    for name, x in inputs.items():
        shifted[name] = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)
        assert shifted[name].data_ptr() % 16
    assert all(map(torch.equal, wkv6(**shifted), want))


@pytest.mark.parametrize("dtype, N", [(torch.float64, 8), (FP32, 129)])
def test_what_no_kernel_takes_is_refused(shim, dtype, N):
    with pytest.raises(ValueError, match=rf"up to 128 channels, not {dtype} and {N}; use op='torch'"):
        wkv6(**make_inputs(dtype, dtype, 1, N, 1, 1))


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
def test_nvcc_builds_a_library_that_loads(kernel, tmp_path):
    try:
        cuda.nvcc()
    except UserError as absent:
        pytest.skip(str(absent))
    lib = cuda.declare(ctypes.CDLL(str(cuda.build_library(f"wkv6_{kernel}", (8, 0), cache=tmp_path))), wkv6_cuda.functions)
    forward, no_work = getattr(lib, f"wkv6_{kernel}_forward"), 0
    arguments = [no_work if kind in (ctypes.c_int, ctypes.c_int64) else None for kind in forward.argtypes]
    assert forward(*arguments) == 1  # cudaErrorInvalidValue: no batch rows
