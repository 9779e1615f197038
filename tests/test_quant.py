"""Adapters on a quantised base: the same as on the dense weight that the bytes stand for, which is near the original."""

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.peft import METHODS, adapter_tensors, adapters, inject, merge
from rwkv_bone.peft.quant import KINDS, quantise, quantise_model

KIND_NAMES = ["int8", "nf4"]


def quantised(weight, kind):
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the bitsandbytes package")
    return quantise(weight, kind)


def random_weight(out, in_, dtype=torch.float32):
    torch.manual_seed(out + in_)
    return (torch.randn(out, in_) / in_**0.5).to(dtype)


every_kind = pytest.mark.parametrize("kind", KIND_NAMES)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_weight_is_small_and_near_the_dense_one(kind, dtype):
    weight = random_weight(96, 128, dtype)
    small = quantised(weight, kind)
    dense = small.dense()
    assert dense.dtype == small.dtype == dtype and dense.shape == small.shape == weight.shape
    bits = sum(b.numel() * 8 for b in small.buffers()) / weight.numel()
    assert bits < {"int8": 8.5, "nf4": 4.6}[kind]
    error = (dense.double() - weight.double()).norm() / weight.double().norm()
    # int8: uniform noise of a step of max/127, about 2.8 sigma/127; nf4: QLoRA's 16 levels
    assert {"int8": 0.004, "nf4": 0.08}[kind] < error < {"int8": 0.009, "nf4": 0.1}[kind]


def test_int8_is_within_half_a_step_and_takes_rows_of_zeros():
    weight = random_weight(20, 33) * torch.logspace(-6, 3, 20).unsqueeze(1)
    weight[3] = 0
    error = (quantise(weight, "int8").dense() - weight).abs()
    assert (error <= 0.5001 * weight.abs().amax(1, keepdim=True) / 127).all()


@every_kind
@pytest.mark.parametrize("name", METHODS)
def test_every_method_on_a_quantised_weight_equals_it_on_the_dense_one(kind, name):
    small = quantised(random_weight(64, 32), kind)
    method = METHODS[name]
    layers = []
    for weight in (small, small.dense()):
        layer = method(weight, method.Config(r=8))
        torch.manual_seed(1)
        layer.start(torch.randn(64, 32)) if method.starts_from_gradient else layer.start()
        with torch.no_grad():
            for p in layer.parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn_like(p)
        layers.append(layer)
    x = torch.randn(3, 5, 32, requires_grad=True)
    results = []
    for layer in layers:
        own = [p for p in layer.parameters() if p.requires_grad]
        y = layer(x)
        results.append([y, layer.merged_weight(), *torch.autograd.grad(y.square().sum(), [x, *own])])
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@every_kind
def test_a_model_with_a_quantised_base_trains_saves_and_merges(kind, make_model):
    model = make_model(dtype=torch.float32)
    if kind == "nf4":
        pytest.importorskip("bitsandbytes", reason="needs the bitsandbytes package")
    names = quantise_model(model, kind)
    assert len(names) == 12
    idx = torch.randint(50, (2, 9))
    base = model(idx)[0]
    assert inject(model, METHODS["bone"], METHODS["bone"].Config(r=4)) == names
    torch.testing.assert_close(model(idx)[0], base, rtol=1e-4, atol=1e-5)
    model(idx)[0].square().mean().backward()
    with torch.no_grad():
        for layer in adapters(model).values():
            assert layer.bone.grad.any()
            layer.bone -= 0.3 * layer.bone.grad / layer.bone.grad.abs().max()
    assert set(adapter_tensors(model)) == {f"{name}.bone" for name in names}  # nothing of the base
    tuned = model(idx)[0]
    assert not torch.allclose(tuned, base, atol=0.01)
    merge(model)  # onto the dequantised base
    assert list(model.state_dict()) == list(make_model().state_dict())
    torch.testing.assert_close(model(idx)[0], tuned, rtol=1e-4, atol=1e-4)


@every_kind
def test_casting_a_model_leaves_the_bytes_alone(kind):
    small = quantised(random_weight(64, 32), kind)
    before = small.dense()
    assert torch.equal(torch.nn.ModuleDict({"w": small}).bfloat16()["w"].dense(), before)


def test_an_unknown_kind_is_refused():
    with pytest.raises(UserError, match=r"fp3.*int8, nf4"):
        quantise(torch.zeros(2, 2), "fp3")
    assert list(KINDS) == KIND_NAMES
