"""Bone's CPU kernels of every instruction set: the same as the torch operations that stand in where they do not fit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_bone.errors import UserError
from rwkv_bone.ops import bone_cpu, wkv6_cpu
from rwkv_bone.peft.bone import BoneLinear, blocks, tile_into
from rwkv_bone.peft.rounding import add_rounded_

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# n, in, out, r
SHAPES = [(1, 64, 64, 64), (5, 128, 70, 64), (3, 257, 40, 257), (2, 16, 24, 8), (33, 512, 256, 64), (2, 49, 104, 7)]
SHAPES += [(2, 4096, 8, 4096)]


@pytest.fixture(params=wkv6_cpu.variants())
def variant(request, monkeypatch):
    number = wkv6_cpu.variant_number(request.param)
    monkeypatch.setattr(wkv6_cpu, "variant_number", lambda name: number)
    return request.param


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n", "in_", "out", "r"), SHAPES)
def test_the_kernels_do_what_the_torch_operations_do(variant, threads, dtype, n, in_, out, r):
    torch.manual_seed(n)
    m = in_ // r
    x, q, g = torch.randn(n, in_).to(dtype), torch.randn(n, in_).to(dtype), torch.randn(n, out).to(dtype)
    u = (0.01 * torch.randn(m, n, r)).to(dtype)
    xu, y = torch.full_like(x, torch.nan), torch.full_like(g, torch.nan)
    du, pieces = torch.full_like(u, torch.nan), torch.full_like(u, torch.nan)
    bone_cpu.call("bone_cpu_forward", x, out, r, x, u, xu, y)
    bone_cpu.call("bone_cpu_backward", x, out, r, x, g, q, du, pieces)
    rows = u.transpose(0, 1)
    assert torch.equal(xu, add_rounded_(rows.flatten(1).clone(), x))  # bit for bit
    assert torch.equal(pieces, blocks(x, r).transpose(0, 1))
    rounding = dict(rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(y.double(), tile_into(torch.empty(n, out).double(), rows.double().sum(1)), **rounding)
    wanted = blocks(q.double(), r) + blocks(g.double(), r).sum(1, keepdim=True)
    torch.testing.assert_close(du.transpose(0, 1).double(), wanted, rtol=rounding["rtol"], atol=2**-16)


def test_nan_and_infinity_stay(variant):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, 3e38, -1.0]).bfloat16().view(1, 8)
    x.view(torch.int16)[0, 2] = -1  # a NaN of all ones: what is added to it must not make a number of it
    u, xu, y = torch.zeros(1, 1, 8).bfloat16(), torch.empty_like(x), torch.empty_like(x)
    bone_cpu.call("bone_cpu_forward", x, 8, 8, x, u, xu, y)
    torch.testing.assert_close(xu, x, rtol=0, atol=0, equal_nan=True)
    assert not y.any()
    du, pieces = torch.empty_like(u), torch.empty_like(u)
    bone_cpu.call("bone_cpu_backward", x, 8, 8, x, torch.zeros_like(x), x, du, pieces)
    torch.testing.assert_close(du.view(1, 8), x, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("wants_dx", [True, False])
def test_the_layer_computes_the_same_with_them(variant, monkeypatch, dtype, wants_dx):
    monkeypatch.setattr(bone_cpu, "AT_ONCE", 5)
    monkeypatch.setattr(bone_cpu, "FEW", 3)  # 14 tokens as 3 + 2, 3 + 2, 3 + 1
    used, call = [], bone_cpu.call
    monkeypatch.setattr(bone_cpu, "call", lambda name, *args: (used.append(name), call(name, *args)))
    results = []
    for kernels in (True, False):
        torch.manual_seed(0)
        layer = BoneLinear(torch.randn(90, 64).to(dtype) / 8, BoneLinear.Config(r=16))
        torch.nn.init.normal_(layer.bone, std=0.1)
        x = torch.randn(2, 7, 64).to(dtype).requires_grad_(wants_dx)
        if not kernels:
            monkeypatch.setattr(bone_cpu, "fits", lambda *_: False)
        y = layer(x)
        wanted = [x, layer.bone] if wants_dx else [layer.bone]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), wanted)])
    assert used == 6 * ["bone_cpu_forward"] + 6 * ["bone_cpu_backward"]
    for a, b in zip(*results):
        assert (a - b).float().norm() / b.float().norm() < (2**-7 if dtype == torch.bfloat16 else 1e-6)


def test_what_they_do_not_take_goes_the_other_way(monkeypatch):
    x = torch.zeros(2, 64)
    assert bone_cpu.fits(x, 16) and bone_cpu.fits(x.bfloat16(), 64)
    assert not bone_cpu.fits(x.double(), 16) and not bone_cpu.fits(x.half(), 16) and not bone_cpu.fits(x, 24)
    assert not bone_cpu.fits(torch.zeros(2, 8192), 8192)
    with FakeTensorMode():
        assert not bone_cpu.fits(torch.zeros(2, 64), 16)

    def fail():
        raise UserError("no compiler here")

    monkeypatch.setattr(wkv6_cpu, "library", fail)
    bone_cpu.available.cache_clear()
    assert not bone_cpu.fits(x, 16)
    bone_cpu.available.cache_clear()
