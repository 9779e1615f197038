"""What "loss" means wherever a run's loss is shown, logged or drawn. Pure numpy; nothing here needs torch.

of a step        sum of the cross entropies of the step's trained tokens / their number, over all micro batches and devices, in
                 nats per token; None (in files null, in arrays NaN) where the step has no trained token
of many steps    the same over all their trained tokens: the mean of the steps' losses, each weighted by its trained tokens.
                 An epoch's loss is that of all its steps.
first, last      of a run of n steps: the loss of its first, and of its last `window(n)` steps
smoothed         at step n the loss of the last `window(n)` steps: what a terminal shows and the line of a picture
"""

from collections import deque
from collections.abc import Iterable, Sequence

import numpy as np

LARGEST = 1e9  # a loss beyond this is that of a step that diverged, like one that is not finite: no mean counts it


def window(steps: int) -> int:
    """How many of the last steps a smoothed loss is taken over, after so many steps: a twentieth of them, at least one."""
    return max(1, steps // 20)


def mean_loss(losses: Sequence[float | None] | np.ndarray, trained: Sequence[float] | np.ndarray) -> float:
    """The loss of many steps; NaN where none of them has one. losses, trained: (steps,), trained in tokens."""
    sums, tokens = _weighted(losses, trained)
    return float(sums.sum() / tokens.sum()) if tokens.any() else float("nan")


def smoothed(losses: Sequence[float | None] | np.ndarray, trained: Sequence[float] | np.ndarray) -> np.ndarray:
    """The smoothed loss at each step (steps,), from the first step on; NaN where no step of the window has a loss."""
    last = np.arange(1, len(losses) + 1)
    first = last - np.maximum(1, last // 20)  # `window`, of arrays
    sums, tokens = (np.concatenate([[0.0], np.cumsum(x)]) for x in _weighted(losses, trained))
    total = tokens[last] - tokens[first]
    return np.where(total > 0, (sums[last] - sums[first]) / np.where(total > 0, total, 1), np.nan)


def first_and_last(losses: Sequence[float | None] | np.ndarray, trained: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """The loss at a run's beginning and at its end, which is the smoothed one there; NaN where none of these steps has one."""
    n = window(len(losses))
    return mean_loss(losses[:n], trained[:n]), mean_loss(losses[-n:], trained[-n:])


class RunningLoss:
    """The smoothed loss while a run goes on: add each step, the earlier ones of a resumed run first."""

    def __init__(self, steps: Iterable[tuple[float | None, int]] = ()):
        self.steps, self.last = 0, deque[tuple[float, float]]()
        for loss, trained in steps:
            self.add(loss, trained)

    def add(self, loss: float | None, trained: int) -> None:
        """loss: of one step, or None; trained: its trained tokens."""
        sums, tokens = _weighted([loss], [trained])
        self.last.append((float(sums[0]), float(tokens[0])))
        self.steps += 1
        while len(self.last) > window(self.steps):
            self.last.popleft()

    @property
    def value(self) -> float:
        """NaN where no step of the window has a loss."""
        tokens = sum(n for _, n in self.last)
        return sum(loss for loss, _ in self.last) / tokens if tokens else float("nan")


def _weighted(losses, trained) -> tuple[np.ndarray, np.ndarray]:
    """Of each step the sum over its trained tokens, and their number; 0, 0 where it has no loss."""
    loss, tokens = np.array(losses, float), np.array(trained, float)  # None is NaN
    counts = (np.abs(loss) <= LARGEST) & (tokens > 0)  # which NaN is not
    return np.where(counts, loss, 0) * np.where(counts, tokens, 0), np.where(counts, tokens, 0)
