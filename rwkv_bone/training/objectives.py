"""Objectives: what makes a batch of samples, and the summed loss of a batch with its count. The loop knows no more.

`OBJECTIVES` is the registry: one subclass of `Objective` and one line for each.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..models import LanguageModel, State
from .loader import TrainingData
from .loss import cross_entropy_sum

Micro = dict[str, Tensor]


class Objective:
    """One way to train. `loss` gives sums, not means: what is divided, and by what count, is decided once for a whole step."""

    in_chunks: ClassVar[bool] = False  # whether a batch may be cut along its tokens (`--train_type infctx`)

    def __init__(self, config: TrainConfig):
        self.config = config

    def open_data(self, model: LanguageModel) -> TrainingData:
        """The run's data, opened once."""
        raise NotImplementedError

    def count(self, micro: Micro) -> Tensor:
        """By how much the summed loss of a micro batch is divided: tokens, pairs, ... A scalar."""
        raise NotImplementedError

    def loss(self, model: LanguageModel, micro: Micro, state: State = None) -> tuple[Tensor, State]:
        """The summed loss of a micro batch, and the state after it."""
        raise NotImplementedError


class TextObjective(Objective):
    """The next token, over the trained tokens of documents."""

    in_chunks = True

    def open_data(self, model: LanguageModel) -> TrainingData:
        return TrainingData.open(self.config, model)

    def count(self, micro: Micro) -> Tensor:
        return (micro["targets"] >= 0).sum()

    def loss(self, model: LanguageModel, micro: Micro, state: State = None) -> tuple[Tensor, State]:
        hidden, state = model.hidden(micro["idx"], state, micro.get("reset"))
        return cross_entropy_sum(hidden, model.head.weight, micro["targets"], self.config.wants_l2wrap(model)), state


OBJECTIVES: dict[str, type[Objective]] = {"text": TextObjective}


class Step(nn.Module):
    """Model and objective as the one module whose forward engines wrap: a micro batch -> summed loss, state after it."""

    def __init__(self, model: LanguageModel, objective: Objective):
        super().__init__()
        self.model, self.objective = model, objective

    def forward(self, micro: Micro, state: State = None) -> tuple[Tensor, State]:
        return self.objective.loss(self.model, micro, state)


def mean_loss(model: LanguageModel, objective: Objective, micro: Micro) -> Tensor:
    return objective.loss(model, micro)[0] / objective.count(micro).clamp(min=1)


@torch.no_grad()
def not_finite_in(model: LanguageModel, micro_batches: list[Micro]) -> str:
    """Where the model first leaves the finite numbers: a trained tensor, a stage's output, or nowhere seen. For a message."""
    for name, p in model.named_parameters():
        if p.requires_grad and not p.isfinite().all():
            return f", {name} is not finite"
    for micro in micro_batches:
        passed: Any = micro["idx"]
        for prefix, _, run in model.stages():
            passed = run(passed)
            x = passed[0] if isinstance(passed, tuple) else passed
            if not x.isfinite().all():
                return f", first not finite after {prefix.rstrip('.')}"
    return ""
