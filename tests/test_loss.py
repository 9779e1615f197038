"""The chunked loss equals the plain one, with its gradients, in a fraction of the memory; schedules equal their formulas."""


import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.training import loss as loss_module
from rwkv_bone.training.loss import cross_entropy_sum


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 7))
    targets[0, :3] = -100
    return hidden, weight, targets


@pytest.mark.parametrize("rows", [1, 4, 100])
@pytest.mark.parametrize("l2wrap", [False, True])
def test_chunked_cross_entropy_equals_the_plain_one(case, rows, l2wrap, monkeypatch):
    hidden, weight, targets = case
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", rows * 4 * len(weight))
    ours = cross_entropy_sum(hidden, weight, targets, l2wrap)
    logits = hidden @ weight.T
    plain = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", ignore_index=-100)
    torch.testing.assert_close(ours, plain)
    # L2Wrap's gradient is that of half the square of each trained position's largest logit
    pull = 0.5e-4 * logits.max(-1).values.square()[targets >= 0].sum() if l2wrap else 0
    for a, b in zip(torch.autograd.grad(3 * ours, (hidden, weight)), torch.autograd.grad(3 * (plain + pull), (hidden, weight))):
        torch.testing.assert_close(a, b)


def test_a_batch_without_a_trained_token_gives_zero_and_zero_gradients(case):
    hidden, weight, targets = case
    total = cross_entropy_sum(hidden, weight, torch.full_like(targets, -100))
    total.backward()
    assert total.item() == 0
    assert hidden.grad.abs().sum() == 0 and weight.grad.abs().sum() == 0


def test_huge_logits_do_not_overflow():
    hidden = torch.full((1, 1, 1), 1e4, requires_grad=True)
    total = cross_entropy_sum(hidden, torch.tensor([[1.0], [-1.0]]), torch.tensor([[1]]))
    total.backward()
    assert total.item() == 2e4 and hidden.grad.isfinite().all()


def test_a_frozen_head_gets_no_gradient(case):
    hidden, weight, targets = case
    weight.requires_grad_(False)
    cross_entropy_sum(hidden, weight, targets).backward()
    assert weight.grad is None and hidden.grad is not None
