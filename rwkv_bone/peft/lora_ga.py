"""LoRA-GA (arXiv 2407.05000): a LoRA whose first step goes where full fine-tuning's would.

From G = U S V^T, the mean gradient of the loss by W over a few batches: A0 = c V_[0,r)^T, B0 = c U_[r,2r), with
c = out^(1/4) / sqrt(gamma) and s = alpha / sqrt(r), as the paper's code has them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adapter import AdapterLinear, adapters, option
from .lora import RankConfig
from .shifted import ShiftedLoraLinear


@dataclass(frozen=True)
class LoraGaConfig(RankConfig):
    alpha: float = option(16.0, "scale: the update is alpha/sqrt(r) B A; 0: alpha = r")
    gamma: float = option(16.0, "size of the start: A and B have columns of length out^(1/4) / sqrt(gamma)")
    init_batches: int = option(8, "batches whose mean gradient the start is made of")

    def __post_init__(self):
        super().__post_init__()
        if not self.gamma > 0:
            raise UserError(f"gamma must be above 0, not {self.gamma}")
        if self.init_batches < 1:
            raise UserError(f"init_batches must be at least 1, not {self.init_batches}")


class LoraGaLinear(ShiftedLoraLinear):
    formula = "W' = W + alpha/sqrt(r) (B A - B0 A0)"
    Config = LoraGaConfig
    config: LoraGaConfig
    starts_from_gradient = True

    def __init__(self, weight: Tensor, config: LoraGaConfig):
        super().__init__(weight, config)
        if 2 * config.r > min(weight.shape):
            raise UserError(f"lora_ga needs 2 r = {2 * config.r} directions, a weight of {tuple(weight.shape)} has fewer")

    @property
    def scale(self) -> float:
        return self.config.alpha / math.sqrt(self.config.r)

    @torch.no_grad()
    def start(self, gradient: Tensor) -> None:  # type: ignore[override]  # `starts_from_gradient` says so
        """gradient (out, in): of the loss by the weight, at any scale."""
        r, (out, in_) = self.config.r, self.weight.shape
        U, _, V = torch.svd_lowrank(gradient.to(self.dtype), q=min(4 * r, out, in_), niter=4)
        c = out**0.25 / math.sqrt(self.config.gamma)
        self.start_at(c * V[:, :r].T, c * U[:, r : 2 * r])


def start_from_gradients(
    model: nn.Module, loss: Callable[[Any], Tensor], batches: Sequence[Any], held: int = 2**32
) -> None:
    """Start every layer whose method needs the gradient: the mean of `loss(batch)`'s over `batches`.

    The gradients of as many layers as fit in `held` bytes are gathered in one pass over the batches, so little memory costs
    passes. The model computes what the base does all the while. Trained tensors are left without gradients.
    """
    layers = [layer for layer in adapters(model).values() if layer.starts_from_gradient]
    for group in groups(layers, held):
        gradients = [torch.zeros(layer.weight.shape, dtype=layer.dtype, device=layer.weight.device) for layer in group]
        hooks = [layer.register_forward_hook(gathers(gradient)) for layer, gradient in zip(group, gradients)]
        try:
            with torch.enable_grad():
                for batch in batches:
                    loss(batch).backward()
        finally:
            for hook in hooks:
                hook.remove()
        model.zero_grad(set_to_none=True)
        for layer, gradient in zip(group, gradients):
            if not gradient.any():
                raise UserError("lora_ga: the first batches give a projection no gradient; give others, or a larger init_batches")
            layer.start(gradient / len(batches))  # type: ignore[call-arg]


def groups(layers: Iterable[AdapterLinear], held: int) -> Iterator[list[AdapterLinear]]:
    """The layers in runs whose weights' gradients need at most `held` bytes, or one layer."""
    group: list[AdapterLinear] = []
    used = 0
    for layer in layers:
        size = math.prod(layer.weight.shape) * layer.dtype.itemsize
        if group and used + size > held:
            yield group
            group, used = [], 0
        group.append(layer)
        used += size
    if group:
        yield group


def gathers(gradient: Tensor) -> Callable:
    """A forward hook that adds a layer's dL/dW = g^T x to `gradient` when backward comes by."""

    def on_forward(layer, inputs, output):
        x = inputs[0].detach().flatten(0, -2)

        def on_backward(g):
            gradient.add_(g.flatten(0, -2).T @ x.to(g.dtype))  # under autocast x may be of another dtype

        if output.requires_grad:
            output.register_hook(on_backward)

    return on_forward
