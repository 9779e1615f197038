"""A direct model computes what the model computes, in the same places."""

import pytest
import torch

from rwkv_bone.models.direct import direct
from rwkv_bone.peft import METHODS, inject
from rwkv_bone.peft.quant import quantise_model


def run(model, idx, state):
    """The output of every block, the logits, and the states."""
    outputs = []
    x = model.emb(idx)
    for block, layer in zip(model.blocks, state):
        x, new = block(x, layer)
        outputs += [x, *new]
    logits, whole = model(idx, state)
    return [*outputs, logits, *(tensor for layer in whole for tensor in layer)]


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (2, 7)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("method", [None, *METHODS])
def test_in_inference_mode_gives_every_output_and_state_of_the_models_training(make_model, method, quantised, dtype, shape):
    model = make_model(dtype=dtype, n_layer=2, time_state=True)
    if quantised:
        quantise_model(model, "int8")
    if method:
        inject(model, METHODS[method], METHODS[method].Config(r=8))
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    idx = torch.randint(50, shape)
    with torch.no_grad():
        _, state = model(torch.randint(50, (shape[0], 3)))
    expected = run(model, idx, state)
    assert expected[0].requires_grad
    with torch.inference_mode():
        ours = run(direct(model), idx, state)
    eps = torch.finfo(dtype).eps
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=8 * eps, atol=8 * eps)


def test_has_the_models_own_tensors_and_leaves_the_model_as_it_is(make_model):
    model = make_model()
    before = {name: type(module) for name, module in model.named_modules()}
    quick = direct(model)
    assert all(a is b for a, b in zip(quick.parameters(), model.parameters(), strict=True))
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert type(quick) is not type(model)
    with torch.no_grad():
        model.blocks[0].att.key.weight.mul_(2)
    idx = torch.randint(50, (1, 3))
    assert torch.equal(quick(idx)[0], model(idx)[0])


def test_a_model_with_hooks_is_left_to_them(make_model):
    model = make_model()
    called = []
    model.blocks[0].att.key.register_forward_pre_hook(lambda module, args: called.append(module))
    assert direct(model) is model
    model(torch.randint(50, (1, 1)))
    assert called == [model.blocks[0].att.key]


@torch.inference_mode()
def test_a_step_does_not_write_into_the_state_that_it_starts_from(make_model):
    model = make_model()
    _, state = model(torch.randint(50, (2, 3)))
    before = [tensor.clone() for layer in state for tensor in layer]
    model(torch.randint(50, (2, 1)), state)
    for kept, tensor in zip(before, (tensor for layer in state for tensor in layer), strict=True):
        assert torch.equal(kept, tensor)
