"""The one definition of a loss: token-weighted, the same number step by step as over the whole run."""

import math

import numpy as np
import pytest

from rwkv_bone.training.losses import RunningLoss, mean_loss, smoothed, window


@pytest.fixture
def run():
    """600 steps: losses, trained tokens, and every token's own loss (NaN where the step has none)."""
    generator = np.random.default_rng(0)
    trained = generator.integers(0, 9, 600)
    losses = generator.normal(3, 1, 600)
    losses[[7, 30]] = math.nan, math.inf
    losses[200] = 1e300  # diverged
    losses = [None if n == 0 else float(x) for x, n in zip(losses, trained)]
    good = [x if x is not None and abs(x) < 1e9 else math.nan for x in losses]
    return losses, trained, [np.full(n, x) for x, n in zip(good, trained)]


def test_the_loss_of_many_steps_is_the_mean_over_their_trained_tokens(run):
    losses, trained, tokens = run
    assert mean_loss(losses, trained) == pytest.approx(np.nanmean(np.concatenate(tokens)))
    assert mean_loss([2.0, 4.0], [3, 1]) == 2.5
    assert math.isnan(mean_loss([None, math.nan], [0, 5])) and math.isnan(mean_loss([], []))


def test_a_smoothed_loss_is_that_of_the_last_twentieth_and_the_same_while_the_run_goes_on(run):
    losses, trained, tokens = run
    drawn, running = smoothed(losses, trained), RunningLoss()
    for i, step in enumerate(zip(losses, trained)):
        last = np.concatenate(tokens[i + 1 - max(1, (i + 1) // 20) : i + 1])
        expected = np.nanmean(last) if np.isfinite(last).any() else math.nan
        running.add(*step)
        assert [drawn[i], running.value] == pytest.approx([expected] * 2, nan_ok=True)
    assert RunningLoss(zip(losses[:400], trained[:400])).value == pytest.approx(drawn[399])  # as a resumed run begins
    assert [window(n) for n in (1, 39, 40, 1000)] == [1, 1, 2, 50]
