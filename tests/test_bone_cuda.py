"""Bone's CUDA kernels, run on the CPU by the shim, and on a GPU where there is one: the same as the torch operations."""

import ctypes

import pytest
import torch
from cuda_shim import CUDA, assert_guards_intact, compile_for_cpu, guarded, guarded_nan

from rwkv_bone.errors import UserError
from rwkv_bone.ops import cuda
from rwkv_bone.ops.bone import cpu as bone_cpu
from rwkv_bone.ops.bone import cuda as bone_cuda
from rwkv_bone.ops.selfcheck import Verdict
from rwkv_bone.peft.bone import BoneLinear, blocks, tile_into
from rwkv_bone.peft.rounding import add_rounded_

BF16 = torch.bfloat16
# n, in, out, r
SHAPES = [(1, 64, 64, 64), (5, 128, 64, 64), (3, 256, 40, 32), (2, 16, 24, 8), (2, 4096, 2048, 64), (2, 48, 104, 24)]
SHAPES += [(1, 2048, 16, 2048), (130, 4096, 16, 8)]


@pytest.fixture(scope="module")
def shim_library(tmp_path_factory):
    library = ctypes.CDLL(str(compile_for_cpu(CUDA / "bone.cu", tmp_path_factory.mktemp("bone"))))
    return cuda.declare(library, bone_cuda.FUNCTIONS)


@pytest.fixture
def shim(shim_library, monkeypatch):
    """CPU tensors go the way of CUDA tensors. Yields the names of the kernels that ran."""
    ran = []

    def run(function, device, *arguments):
        ran.append(function.__name__)
        assert function(*(x.data_ptr() if isinstance(x, torch.Tensor) else x for x in arguments), None) == 0

    monkeypatch.setattr(bone_cuda, "library", lambda device: shim_library)
    monkeypatch.setattr(bone_cuda, "fits", lambda x, g, out, r: x.dtype == BF16 and bone_cuda.sizes_fit(x.shape[1], out, r))
    monkeypatch.setattr(bone_cpu, "fits", lambda *_: False)
    monkeypatch.setattr(bone_cuda, "run", run)
    return ran


@pytest.mark.parametrize(("n", "in_", "out", "r"), SHAPES)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_kernels_do_what_the_torch_operations_do(shim, shim_library, n, in_, out, r, seed):
    shim_library.cuda_shim_seed(seed)
    torch.manual_seed(n)
    x, u = guarded(torch.randn(n, in_).to(BF16)), guarded((0.01 * torch.randn(n, in_ // r, r)).to(BF16))
    g, q = guarded(torch.randn(n, out).to(BF16)), guarded(torch.randn(n, in_ // r, r).to(BF16))
    y, du = guarded_nan((n, out), BF16), guarded_nan((n, in_ // r, r), BF16)
    s = u.float().sum(1)
    rounded = add_rounded_(u.flatten(1).clone(), x)
    bone_cuda.forward(x, u, y)
    bone_cuda.backward(g, q, du)
    assert torch.equal(u.flatten(1), rounded)  # bit for bit
    torch.testing.assert_close(y.float(), tile_into(torch.empty(n, out), s), rtol=2**-8, atol=1e-6)
    t = blocks(g.float(), r).sum(1, keepdim=True)
    torch.testing.assert_close(du.float(), q.float() + t, rtol=2**-8, atol=2**-16)
    assert_guards_intact(x, u, g, q, y, du)


def test_nan_and_infinity_stay(shim):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, 3e38, -1.0]).to(BF16).view(1, 8)
    u, y = torch.zeros(1, 1, 8, dtype=BF16), torch.empty(1, 8, dtype=BF16)
    bone_cuda.forward(x, u, y)
    torch.testing.assert_close(u.view(1, 8), x, rtol=0, atol=0, equal_nan=True)
    assert not y.any()


def test_the_layer_computes_the_same_with_them(shim, monkeypatch):
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = BoneLinear(torch.randn(96, 64).to(BF16) / 8, BoneLinear.Config(r=16))
        torch.nn.init.normal_(layer.bone, std=0.1)
        x = torch.randn(2, 7, 64).to(BF16).requires_grad_()
        if not fused:
            monkeypatch.setattr(bone_cuda, "fits", lambda *_: False)
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, layer.bone])])
    assert shim == ["bone_forward", "bone_backward"]
    for a, b in zip(*results):
        assert ((a - b).float().norm() / b.float().norm()) < 2**-7


def test_sizes_they_do_not_take_go_the_other_way():
    assert bone_cuda.sizes_fit(2048, 7168, 64)
    for in_, out, r in ((96, 64, 12), (100, 64, 8), (64, 60, 8), (4096, 4096, 4096)):
        assert not bone_cuda.sizes_fit(in_, out, r)
    assert not bone_cuda.fits(torch.zeros(2, 64, dtype=BF16), None, 64, 64)  # on the CPU


@pytest.mark.parametrize("fault", ["built", "wrong"])
def test_that_they_cannot_be_used_is_said_once(monkeypatch, capsys, fault):
    def verdict(*args):
        if fault == "built":
            raise UserError("no nvcc here")
        return Verdict(False, "y is off by 1e-01")

    monkeypatch.setattr(bone_cuda, "verdict", verdict)
    bone_cuda._verdict.cache_clear()
    device = torch.device("cuda", 0)
    assert bone_cuda.library(device) is None and bone_cuda.library(device) is None
    assert bone_cuda.describe(device) == "in plain torch"
    bone_cuda._verdict.cache_clear()
    assert capsys.readouterr().err.count("no nvcc here" if fault == "built" else "off by 1e-01") == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize(("n", "in_", "out", "r"), SHAPES)
def test_on_a_gpu_the_kernels_do_what_the_torch_operations_do(n, in_, out, r):
    x, u = torch.randn(n, in_).to("cuda", BF16), (0.01 * torch.randn(n, in_ // r, r)).to("cuda", BF16)
    y, s = x.new_empty(n, out), u.float().sum(1)
    rounded = add_rounded_(u.flatten(1).clone(), x)
    bone_cuda.forward(x, u, y)
    assert torch.equal(u.flatten(1), rounded)
    torch.testing.assert_close(y.float(), tile_into(y.float(), s), rtol=2**-8, atol=1e-6)
    g, q, du = torch.randn(n, out).to("cuda", BF16), torch.randn_like(u), torch.empty_like(u)
    bone_cuda.backward(g, q, du)
    t = blocks(g.float(), r).sum(1, keepdim=True)
    torch.testing.assert_close(du.float(), q.float() + t, rtol=2**-8, atol=2**-16)
