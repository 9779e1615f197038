"""The chunked loss equals the plain one, with its gradients, in a fraction of the memory; schedules equal their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.training import loss as loss_module
from rwkv_bone.training.loss import cross_entropy_sum
from rwkv_bone.training.schedule import SCHEDULES, learning_rate


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


def rates(schedule, steps=11, lr_init=1e-3, lr_final=1e-5, warmup=0):
    return [learning_rate(step, steps, schedule, lr_init, lr_final, warmup) for step in range(steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_goes_from_lr_init_to_lr_final(schedule):
    first, *_, last = rates(schedule)
    assert first == pytest.approx(1e-3)
    assert last == pytest.approx(1e-3 if schedule == "constant" else 1e-5)


def test_schedules_are_their_formulas():
    assert rates("exp")[5] == pytest.approx(1e-4)
    assert rates("exp", lr_final=0)[5] == pytest.approx(5e-4)
    assert rates("cos")[5] == pytest.approx((1e-3 + 1e-5) / 2)
    assert rates("cos")[2] == pytest.approx(1e-5 + 0.99e-3 * (1 + math.cos(0.2 * math.pi)) / 2)
    assert rates("wsd")[8] == pytest.approx(1e-3)
    assert rates("wsd")[9] == pytest.approx((1e-3 + 1e-5) / 2)


def test_the_warm_up_is_rwkv_lms():
    assert rates("constant", warmup=4)[:5] == pytest.approx([1e-5, 1e-3 * (0.01 + 0.99 / 4), 5.05e-4, 7.525e-4, 1e-3])
