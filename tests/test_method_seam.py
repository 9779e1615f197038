"""Every method works on any `nn.Linear`: with a bias, under autocast, in a transformers model, over a quantised base."""

import copy
import math

import pytest
import torch
from torch import nn

from rwkv_bone.errors import UserError
from rwkv_bone.peft import METHODS, adapter_tensors, adapters, attach, disabled, inject, merge, start_from_gradients
from rwkv_bone.peft.adapter import FrozenLinear
from rwkv_bone.peft.quant import quantise, quantise_model

every_method = pytest.mark.parametrize("name", METHODS)


def two_layers(dtype=torch.float64):
    """Two layers, of which the first has a bias that matters."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 16, bias=False)).to(dtype)
    nn.init.normal_(model[0].bias)
    return model.requires_grad_(False)


def adapted(model, name, x, **more):
    """The model with a started adapter on every linear layer."""
    method = METHODS[name]
    torch.manual_seed(2)
    inject(model, method, method.Config(r=4, **more))
    if method.starts_from_gradient:
        start_from_gradients(model, lambda x: model(x).pow(2).sum(), [x])
    return model


def moved(model):
    """Some way from the start, as after training."""
    torch.manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.1 * torch.randn_like(p)
    return model


def inputs(dtype=torch.float64):
    torch.manual_seed(4)
    return torch.randn(2, 5, 24, dtype=dtype)


# ---------------------------------------------------------------- bias


@every_method
def test_a_started_adapter_leaves_a_layer_with_a_bias_as_it_was(name):
    x, base = inputs(), two_layers()
    assert torch.allclose(adapted(copy.deepcopy(base), name, x)(x), base(x), rtol=0, atol=1e-12)


@every_method
def test_the_bias_is_added_once_stays_frozen_and_is_in_no_adapter_file(name):
    x, base = inputs(), two_layers()
    model = moved(adapted(copy.deepcopy(base), name, x))
    layer = model[0]
    assert torch.allclose(layer(x), x @ layer.merged_weight().T + base[0].bias, rtol=0, atol=1e-12)
    assert torch.equal(layer.bias, base[0].bias) and not layer.bias.requires_grad
    assert set(adapter_tensors(model)) == {n for n in model.state_dict() if n.rpartition(".")[2] not in ("weight", "bias")}


@every_method
def test_merging_keeps_the_bias_and_the_output(name):
    x, base = inputs(), two_layers()
    model = moved(adapted(copy.deepcopy(base), name, x))
    expected = model(x)
    merge(model)
    assert list(model.state_dict()) == list(base.state_dict()) and type(model[0]) is nn.Linear
    assert torch.equal(model[0].bias, base[0].bias) and model[2].bias is None
    assert torch.allclose(model(x), expected, rtol=0, atol=1e-12)


@every_method
def test_an_adapter_put_on_again_is_the_same_model(name):
    x, base = inputs(), two_layers()
    model = moved(adapted(copy.deepcopy(base), name, x))
    method = METHODS[name]
    again = copy.deepcopy(base)
    attach(again, method, model[0].config, ["0", "2"])
    again.load_state_dict(adapter_tensors(model), strict=False)
    assert torch.equal(again(x), model(x))


# ---------------------------------------------------------------- autocast


@every_method
def test_under_autocast_a_layer_computes_as_a_linear_one_does(name):
    x, base = inputs(torch.float32), two_layers(torch.float32)
    model = moved(adapted(copy.deepcopy(base), name, x))
    exact = model(x)
    exact.pow(2).sum().backward()
    of_exact = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
        assert y.dtype == base(x).dtype == torch.bfloat16
    y.float().pow(2).sum().backward()
    assert (y - exact).norm() < 0.02 * exact.norm()
    for n, p in model.named_parameters():
        if p.requires_grad:
            assert p.dtype == p.grad.dtype == torch.float32
            assert (p.grad - of_exact[n]).norm() < 0.05 * of_exact[n].norm(), n


@every_method
def test_under_autocast_the_input_gets_its_gradient_in_its_own_dtype(name):
    x, base = inputs(torch.float32), two_layers(torch.float32)
    model = moved(adapted(copy.deepcopy(base), name, x))
    model(x.requires_grad_()).sum().backward()
    exact, x.grad = x.grad, None
    with torch.autocast("cpu", torch.bfloat16):
        model(x).sum().backward()
    assert x.grad.dtype == torch.float32 and (x.grad - exact).norm() < 0.05 * exact.norm()


def test_lora_ga_starts_under_autocast_as_without():
    x, base = inputs(torch.float32), two_layers(torch.float32)
    exact = adapted(copy.deepcopy(base), "lora_ga", x)
    model = copy.deepcopy(base)
    method = METHODS["lora_ga"]
    inject(model, method, method.Config(r=4))

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x).float().pow(2).sum()

    start_from_gradients(model, loss, [x])
    for got, wanted in zip(adapters(model).values(), adapters(exact).values()):
        # the same directions, whatever their signs and order
        for a, b in ((got.lora_A.T, wanted.lora_A.T), (got.lora_B, wanted.lora_B)):
            onto = torch.linalg.qr(b)[0]
            assert (onto.T @ torch.linalg.qr(a)[0]).norm() > 0.9 * math.sqrt(b.shape[1])
    assert torch.allclose(model(x), base(x), atol=1e-5)


# ---------------------------------------------------------------- the base's output


@every_method
def test_disabled_gives_the_bases_output_and_comes_back(name):
    x, base = inputs(), two_layers()
    model = moved(adapted(copy.deepcopy(base), name, x))
    tuned = model(x)
    assert not torch.allclose(tuned, base(x))
    with disabled(model):
        assert torch.allclose(model(x), base(x), rtol=0, atol=1e-12)
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert torch.equal(model(x), tuned)
    with pytest.raises(RuntimeError, match="within"), disabled(model):
        raise RuntimeError("within")
    assert torch.equal(model(x), tuned)


def test_the_bases_output_is_refused_where_its_own_parameters_were_trained():
    model = adapted(two_layers(), "bone", inputs())
    model[0].bias.requires_grad_(True)
    trained_head = nn.Sequential(model, nn.Linear(16, 2, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"1\.weight|0\.0\.bias"), disabled(trained_head):
        pass


# ---------------------------------------------------------------- quantised


@every_method
def test_a_quantised_layer_keeps_its_bias(name):
    x, base = inputs(torch.float32), two_layers(torch.float32)
    quantise_model(base, "int8")
    assert all(type(base[i]) is FrozenLinear for i in (0, 2))
    dense = two_layers(torch.float32)
    for i in (0, 2):
        dense[i].weight = nn.Parameter(base[i].weight.dense(), requires_grad=False)
    assert torch.allclose(base(x), dense(x), atol=1e-6)
    expected = adapted(dense, name, x)(x)
    model = adapted(base, name, x)
    assert torch.allclose(model(x), expected, atol=1e-4)
    moved(model)
    expected = model(x)
    merge(model)
    assert torch.allclose(model(x), expected, atol=1e-4) and model[0].bias is not None


@pytest.mark.parametrize("bias", [None, torch.ones(6)], ids=["plain", "bias"])
def test_a_frozen_layer_computes_under_autocast_as_a_linear_one_does(bias):
    torch.manual_seed(5)
    layer = FrozenLinear(quantise(torch.randn(6, 8), "int8"), bias)
    x = torch.randn(3, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y - layer(x)).norm() < 0.02 * y.float().norm()
    y.sum().backward()
    assert x.grad.dtype == torch.float32 and (x.grad - layer.weight.dense().sum(0)).norm() < 0.05 * x.grad.norm()


# ---------------------------------------------------------------- a transformers model


@pytest.fixture(scope="module")
def qwen():
    """A random small Qwen2 with biases on q, k, v that matter."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(6)
    config = transformers.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    model = transformers.Qwen2ForCausalLM(config).double().eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


@every_method
def test_a_qwen2_is_adapted_unchanged_at_the_start_and_merged_equal(name, qwen):
    model, idx = copy.deepcopy(qwen), torch.arange(24).view(2, 12)
    expected = qwen(idx).logits
    method = METHODS[name]
    parts = ["q_proj", "k_proj", "v_proj", "mlp.down_proj"]
    assert len(inject(model, method, method.Config(r=4), parts)) == 8
    if method.starts_from_gradient:
        start_from_gradients(model, lambda idx: model(idx).logits.pow(2).sum(), [idx])
    assert torch.allclose(model(idx).logits, expected, rtol=0, atol=1e-10)
    moved(model)
    tuned = model(idx).logits
    assert not torch.allclose(tuned, expected, atol=1e-3)
    with disabled(model):
        assert torch.allclose(model(idx).logits, expected, rtol=0, atol=1e-10)
    merge(model)
    assert list(model.state_dict()) == list(qwen.state_dict())
    assert torch.allclose(model(idx).logits, tuned, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- messages


def refusals():
    bone, lora, lora_ga = (METHODS[name] for name in ("bone", "lora", "lora_ga"))
    yield "a part that there is not", lambda: inject(two_layers(), bone, bone.Config(4), ["nowhere"])
    yield "a size below 1", lambda: bone.Config(0)
    yield "an option that there is not", lambda: bone.config_from({"alpha": 1.0}, "bone")
    yield "an option of another type", lambda: lora.config_from({"r": "many"}, "lora")
    yield "a negative scale", lambda: lora.Config(alpha=-1.0)
    yield "too high a rank", lambda: inject(two_layers(), lora_ga, lora_ga.Config(r=16))
    yield "an unknown quantisation", lambda: quantise(torch.ones(2, 2), "int3")
    yield "no gradient", without_gradient


def without_gradient():
    model, method = two_layers(torch.float32), METHODS["lora_ga"]
    inject(model, method, method.Config(r=4))
    start_from_gradients(model, lambda x: 0 * model(x).sum(), [torch.ones(1, 24)])


@pytest.mark.parametrize(("what", "call"), list(refusals()), ids=[what for what, _ in refusals()])
def test_a_message_of_the_python_api_names_no_flag(what, call):
    with pytest.raises(UserError) as refused:
        call()
    assert "--" not in str(refused.value) and "\n" not in str(refused.value)
