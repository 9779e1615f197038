"""What one device, DDP and DeepSpeed do differently in a step and in a checkpoint. All else in training/ knows only this.

One device and DDP hold everything on each device. ZeRO shares out over the devices: stage 1 the optimiser's state, 2 the
gradients too, 3 all weights too.
"""

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from ..peft import adapter_tensors


class Engine:
    """One device, or DDP, which averages whole gradients once a step."""

    sharded = False  # whether each device's optimiser state is another

    def __init__(self, module):
        self.module, self.trainer = module, module.trainer

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of `loss`; `last` is the last call of the step, at which devices exchange them."""
        alone = self.trainer.world_size > 1 and not last
        with self.trainer.strategy.block_backward_sync() if alone else contextlib.nullcontext():
            self.module.manual_backward(loss)

    def step(self, clip: float) -> float:
        """Clip to the norm `clip` (0: not), step, drop the gradients. Returns the norm before; if that is not finite, no step."""
        optimiser = self.module.optimizers()
        trained = [p for p in self.module.model.parameters() if p.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, clip or math.inf))
        if math.isfinite(norm):
            optimiser.step()
        optimiser.zero_grad()
        return norm

    def trained(self) -> dict[str, Tensor]:
        """What a file needs beside the base, whole. All devices must ask; the first gets it."""
        return adapter_tensors(self.module.model)

    def optimiser_state(self) -> dict[str, Any]:
        return self.module.optimizers().optimizer.state_dict()

    def load_optimiser_state(self, state: dict[str, Any]) -> None:
        self.module.optimizers().optimizer.load_state_dict(state)
