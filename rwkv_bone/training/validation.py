"""Loss on held-out data while a run goes on. Each measure is a line of val_data.jsonl; the best adapter stays rwkv-best.pth.

Where a resumed run stands (its best loss, how long ago that was) is read from the log, cut to the step it is resumed from.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..config import TrainConfig
from .infctx import equal_lengths, loss_in_chunks
from .objectives import Objective
from .outputs import RunFolder
from .strategies import Engine


class Best:
    """The lowest loss so far, and how many measures ago that was."""

    def __init__(self, losses: list[float] | None = None):
        self.loss, self.since = math.inf, 0
        for loss in losses or []:
            self.note(loss)

    @classmethod
    def of_log(cls, folder: RunFolder, step: int) -> "Best":
        """As it stood after that step; a measure before the first step is of no adapter."""
        return cls([measure["loss"] for measure in folder.lines("val_data.jsonl") if 0 < measure["step"] <= step])

    def note(self, loss: float) -> bool:
        """Whether that is the lowest loss so far."""
        better = loss < self.loss
        self.loss, self.since = (loss, 0) if better else (self.loss, self.since + 1)
        return better


@torch.no_grad()
def measure(
    engine: Engine, objective: Objective, held_out: Iterator[dict[str, Tensor]], config: TrainConfig
) -> tuple[float, int]:
    """Mean loss over all devices' held-out micro batches, and its count."""
    engine.model.eval()
    total: Any = 0.0
    count: Any = 0
    for micro in held_out:
        micro = {name: tensor.to(engine.device) for name, tensor in micro.items()}
        if config.train_type == "infctx":
            if engine.sharded:
                micro = equal_lengths([micro], engine.max)[0]
            total = total + loss_in_chunks(engine.forward, micro, config.chunk_ctx)
        else:
            total = total + engine.forward(micro)[0]
        count = count + objective.count(micro)
    engine.model.train()
    total, count = engine.sum([total, count])
    return total / max(count, 1), int(count)
