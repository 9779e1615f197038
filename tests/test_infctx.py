"""A sequence in chunks trains as the whole sequence does, and in the memory of a chunk."""

import pytest
import torch

from rwkv_bone.peft import METHODS, inject
from rwkv_bone.training.infctx import backward_in_chunks
from rwkv_bone.training.loss import cross_entropy_sum


@pytest.fixture
def case(make_model):
    model = make_model(n_layer=3)
    inject(model, METHODS["bone"], METHODS["bone"].Config(8))
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    targets = torch.randint(50, (2, 21))
    targets[:, 8:12] = -100  # a whole chunk without a trained token
    return model, {"idx": torch.randint(50, (2, 21)), "targets": targets}


def forward(model):
    def loss_and_state(piece, state):
        hidden, state = model.hidden(piece["idx"], state)
        return cross_entropy_sum(hidden, model.head.weight, piece["targets"]), state

    return loss_and_state


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("chunk", "version"), [(1, "x070"), (4, "x060"), (4, "x070"), (21, "x070"), (100, "x070")])
def test_full_gradient_in_chunks_equals_the_unchunked_run(case, chunk):
    model, micro = case
    whole = cross_entropy_sum(model.hidden(micro["idx"])[0], model.head.weight, micro["targets"])
    (whole * 0.3).backward()
    expected = gradients(model)
    model.zero_grad()
    calls = []

    def backward(loss, last):
        calls.append(last)
        (loss * 0.3).backward()

    total = backward_in_chunks(forward(model), micro, chunk, truncate=False, backward=backward)
    torch.testing.assert_close(total, whole.detach())
    assert calls == [False] * (len(calls) - 1) + [True]
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], msg=name)


def test_truncated_gradients_are_those_of_chunks_that_start_from_a_given_state(case):
    model, micro = case
    total = backward_in_chunks(forward(model), micro, 6, truncate=True, backward=lambda loss, last: loss.backward())
    ours = gradients(model)
    model.zero_grad()
    state, expected = None, 0
    for idx, targets in zip(micro["idx"].split(6, 1), micro["targets"].split(6, 1)):
        hidden, state = model.hidden(idx, state)
        state = [type(layer)(*(t.detach() for t in layer)) for layer in state]
        expected = expected + cross_entropy_sum(hidden, model.head.weight, targets)
    expected.backward()
    torch.testing.assert_close(total, expected.detach())
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_kept_activations_do_not_grow_with_the_context(case):
    model, _ = case

    def most_kept(length):
        alive = peak = 0

        class Kept:
            def __init__(self, tensor):
                nonlocal alive, peak
                self.tensor = tensor
                alive += tensor.numel()
                peak = max(peak, alive)

            def __del__(self):
                nonlocal alive
                alive -= self.tensor.numel()

        idx = torch.randint(50, (1, length))
        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            micro = {"idx": idx, "targets": idx}
            backward_in_chunks(forward(model), micro, 8, truncate=False, backward=lambda loss, last: loss.backward())
        return peak

    assert most_kept(64) <= 1.01 * most_kept(16)
