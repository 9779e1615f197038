"""Bone's CPU kernels of every instruction set: the same as the torch operations that stand in where they do not fit."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from rwkv_bone.errors import UserError
from rwkv_bone.ops.bone import cpu as bone_cpu
from rwkv_bone.peft.bone import BoneLinear, blocks, tile_into
from rwkv_bone.peft.rounding import add_rounded_, dithered

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# n, in, out, r: tiles of 64 and 128 tokens, whole and cut; r that vectors and pairs divide and do not
SHAPES = [(1, 64, 64, 64), (5, 128, 70, 64), (3, 257, 40, 257), (2, 16, 24, 8), (129, 512, 256, 64), (2, 49, 104, 7)]
SHAPES += [(300, 96, 64, 32), (2, 1024, 8, 512), (131, 66, 40, 22), (150, 48, 80, 16), (40, 384, 96, 96)]


LESS = {"no pairs": 0, "no squares": 1}  # the fastest on a processor that has no products of bf16, or none of squares of them


@pytest.fixture(params=[*bone_cpu.kernels.variants, *LESS])
def variant(request, monkeypatch):
    if request.param in LESS:
        if bone_cpu.pairs_here() < LESS[request.param]:
            pytest.skip("this processor has no products of bf16")
        monkeypatch.setattr(bone_cpu, "pairs_here", lambda: LESS[request.param])
    else:
        monkeypatch.setattr(bone_cpu.kernels, "variants", [request.param])
    return request.param


@pytest.fixture
def threads(out):
    """Three for one half of the shapes, one for the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(3 if out % 16 else 1)
    yield
    torch.set_num_threads(before)


def sixteenths(*shape):
    """Few bits: their products and sums are exact in float32, in whatever order."""
    return torch.randint(-16, 17, shape) / 16


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n", "in_", "out", "r"), SHAPES)
def test_forward_is_the_formula_bit_for_bit(variant, threads, dtype, n, in_, out, r):
    torch.manual_seed(n)
    x, b = sixteenths(n, in_), sixteenths(in_ // r, r, r) / 16
    u = torch.einsum("njk,jck->njc", blocks(x, r), b)
    xu, y = torch.full((n, in_), torch.nan, dtype=dtype), torch.full((n, out), torch.nan, dtype=dtype)
    x = x.to(dtype)
    bone_cpu.call("forward", x, out, r, x, bone_cpu.packed(b.mT, dtype), xu, y)
    whole = x.float() + u.flatten(1)
    assert torch.equal(xu, whole if dtype == torch.float32 else dithered(whole, dtype))
    assert torch.equal(y, tile_into(torch.empty(n, out), u.sum(1)).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize(("n", "in_", "out", "r"), SHAPES)
def test_backward_is_the_formula(variant, threads, dtype, n, in_, out, r):
    torch.manual_seed(n)
    m = in_ // r
    x, q, g = torch.randn(n, in_).to(dtype), torch.randn(n, in_).to(dtype), torch.randn(n, out).to(dtype)
    b = (0.01 * torch.randn(m, r, r)).to(dtype)
    du = blocks(q.double(), r) + blocks(g.double(), r).sum(1, keepdim=True)
    eps = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    for shares, groups, wants_dx in ((1, 1, False), (1, 2, True), (3, 1, True), (2, 3, True)):
        dx = q.clone()
        db = torch.zeros(shares, m, r, -(-r // bone_cpu.LANES) * bone_cpu.LANES)
        bone_cpu.call("backward", x, out, r, x, bone_cpu.packed(b, dtype), g, dx, db, shares, groups, wants_dx)
        wanted = torch.einsum("njc,njk->jck", du, blocks(x.double(), r))
        assert (db.sum(0)[..., :r] - wanted).norm() < eps * wanted.norm()
        assert not db[..., r:].any()
        wanted = blocks(q.double(), r) + torch.einsum("njc,jck->njk", du, b.double()) if wants_dx else blocks(q.double(), r)
        torch.testing.assert_close(blocks(dx, r).double(), wanted, rtol=eps, atol=4 * eps)


@pytest.mark.parametrize("r", [0, 16, 7, 200])
def test_the_sum_without_bias_is_the_pattern_of_torch(variant, r):
    u, x = (sixteenths(70, 100).bfloat16()[:, :90] * scale for scale in (2**-8, 1))
    tile = sixteenths(70, r).bfloat16() if r else None
    x[3, 4] = torch.nan
    whole = u.float() + x.float() + (tile.float()[:, torch.arange(90) % r] if r else 0)
    assert bone_cpu.add_fits(u, x)
    torch.testing.assert_close(add_rounded_(u, x, tile), dithered(whole, torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("r", [1, 16])  # alone, and in pairs
def test_nan_and_infinity_stay(variant, r):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 1.0, 3e38, -1.0]).bfloat16()
    x.view(torch.int16)[2] = -1  # a NaN of all ones: what is added to it must not make a number of it
    x = x.repeat(r).view(r, 8).T.repeat(1, 2).contiguous()  # 8 tokens of 2 r, each with one number
    n = len(x)
    xu, y = torch.empty_like(x), torch.empty(n, r).bfloat16()
    zeros, b = torch.zeros_like(x), bone_cpu.packed(torch.zeros(2, r, r), x.dtype)
    bone_cpu.call("forward", x, r, r, x, b, xu, y)
    torch.testing.assert_close(xu[3:], x[3:], rtol=0, atol=0)
    assert y[:3].isnan().all() and not y[3:].any()  # 0 times infinity, as in the formula
    q, db = x.clone(), torch.zeros(1, 2, r, 16)
    bone_cpu.call("backward", x, r, r, zeros, b, torch.zeros_like(y), q, db, 1, 1, True)
    torch.testing.assert_close(q[3:], x[3:], rtol=0, atol=0)
    assert not q[:3].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("wants_dx", [True, False])
def test_the_layer_computes_the_same_with_them(variant, monkeypatch, dtype, wants_dx):
    monkeypatch.setattr(bone_cpu, "at_once", lambda: 5)  # 14 tokens as 5, 5, 4
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
    assert used == 3 * ["forward"] + 3 * ["backward"]
    for a, b in zip(*results):
        assert (a - b).float().norm() / b.float().norm() < (2**-7 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("wants_dx", [True, False])
@pytest.mark.parametrize("size", [2e-5, 0.1, 3])  # of B: just started, trained, and I + B too near to singular to be inverted
def test_for_many_tokens_w_is_made_and_the_gradients_are_still_the_formulas(variant, monkeypatch, wants_dx, size):
    monkeypatch.setattr(bone_cpu, "at_once", lambda: 90)
    made, merged = [], bone_cpu.merged
    monkeypatch.setattr(bone_cpu, "merged", lambda *args: (made.append(1), merged(*args))[1])
    torch.manual_seed(0)
    layer = BoneLinear(torch.randn(96, 64) / 8, BoneLinear.Config(r=8))
    torch.nn.init.uniform_(layer.bone, -size, size)
    x, g = torch.randn(200, 64, requires_grad=wants_dx), torch.randn(200, 96)
    wanted = [x, layer.bone] if wants_dx else [layer.bone]
    y = layer(x)
    ours = [y, *torch.autograd.grad(y, wanted, g)]
    assert len(made) == (1 if size == 3 else 2)
    exact = BoneLinear(layer.weight.double(), layer.config).double()
    exact.bone.data = layer.bone.detach().double()
    x = x.detach().double().requires_grad_(wants_dx)
    y = exact(x)
    for a, b in zip(ours, [y, *torch.autograd.grad(y, [x, exact.bone] if wants_dx else [exact.bone], g.double())]):
        assert (a - b).norm() < 1e-6 * b.norm()
    # what is added to W arrives whole
    base = x.detach() @ layer.weight.double().T
    assert (ours[0] - y).norm() < 0.01 * (y - base).norm()


def test_the_weight_need_not_be_contiguous_nor_the_default_dtype_float32():
    torch.manual_seed(0)
    b, x, g = 0.1 * torch.randn(4, 16, 16), torch.randn(200, 64), torch.randn(200, 96)
    for w in (torch.randn(64, 96).T, torch.randn(96, 80)[:, :64]):
        wanted = bone_cpu.forward(x, w.contiguous(), b), *bone_cpu.backward(x, w.contiguous(), b, g, True)
        torch.set_default_dtype(torch.float64)
        try:
            found = bone_cpu.forward(x, w, b), *bone_cpu.backward(x, w, b, g, True)
        finally:
            torch.set_default_dtype(torch.float32)
        for a, b_ in zip(found, wanted):
            torch.testing.assert_close(a, b_)


def test_within_autocast_many_tokens_go_as_few_do():
    layer = BoneLinear(torch.randn(32, 64), BoneLinear.Config(r=16))
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(400, 64)).dtype == layer(torch.randn(4, 64)).dtype


def test_w_is_not_made_where_that_would_be_slower_or_lose_digits():
    def many(n=192, out=96, dtype=torch.float32):
        return bone_cpu.many(torch.zeros(n, 64, dtype=dtype), torch.zeros(out, 64, dtype=dtype), torch.zeros(8, 8, 8))

    assert many() and not many(n=191) and not many(out=90) and not many(dtype=torch.bfloat16)
    good = torch.eye(8) + 0.1 * torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    inverse = bone_cpu.inverted(good)
    torch.testing.assert_close(inverse @ good, torch.eye(8).expand(3, -1, -1))
    for bad in (torch.zeros(8), torch.tensor([1.0] * 7 + [1e-3]), torch.full((8,), torch.nan)):
        spoilt = good.clone()
        spoilt[1] = torch.diag(bad)
        assert bone_cpu.inverted(spoilt) is None


def test_what_they_do_not_take_goes_the_other_way(monkeypatch):
    x = torch.zeros(2, 64)
    assert bone_cpu.fits(x, 16) and bone_cpu.fits(x.bfloat16(), 64)
    assert not bone_cpu.fits(x.double(), 16) and not bone_cpu.fits(x.half(), 16) and not bone_cpu.fits(x, 24)
    assert not bone_cpu.fits(torch.zeros(2, 1024), 1024)
    with FakeTensorMode():
        assert not bone_cpu.fits(torch.zeros(2, 64), 16)

    def fail():
        raise UserError("no compiler here")

    kernels = type(bone_cpu.kernels)("bone", {})  # whose library is not loaded yet
    monkeypatch.setattr(kernels, "build_library", fail)
    monkeypatch.setattr(bone_cpu, "kernels", kernels)
    assert not bone_cpu.fits(x, 16)
