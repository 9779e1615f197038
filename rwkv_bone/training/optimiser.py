"""Optimisers: groups by learning rate and weight decay, and float32 masters of parameters kept in bf16, under any optimiser.

`OPTIMISERS` is the registry: one line for each.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import TrainConfig
from ..models import LanguageModel
from ..peft import AdapterLinear, adapters

Groups = list[dict[str, Any]]


class Entry(NamedTuple):
    """An optimiser: how it is made of parameter groups (each with its `lr` and `weight_decay`), and its state's size."""

    make: Callable[[Groups, TrainConfig], torch.optim.Optimizer]
    bytes: int  # of its state for each trained parameter


class AdamW(torch.optim.AdamW):
    """torch's, whose methods are wrapped in what its compiler needs and what imports that, for two seconds: here they are not."""

    add_param_group, zero_grad, state_dict, load_state_dict = (
        inspect.unwrap(getattr(torch.optim.AdamW, name))
        for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
    )
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(groups: Groups, config: TrainConfig) -> torch.optim.Optimizer:
    return AdamW(
        groups, lr=config.lr_init, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True
    )


OPTIMISERS: dict[str, Entry] = {"adamw": Entry(adamw, 8)}


class MasterWeights:
    """An optimiser over float32 copies of the bf16 parameters: it steps the copies, which are then rounded into the parameters.

    In bf16 alone a step smaller than 2^-9 of a weight would be lost. Float32 parameters, such as adapters, are stepped as they
    are. `make(groups)` gives the optimiser that does the steps.
    """

    def __init__(self, groups: Groups, make: Callable[[Groups], torch.optim.Optimizer]):
        self.low = [p for group in groups for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
        self.masters = {p: nn.Parameter(p.detach().float()) for p in self.low}
        self.inner = make([{**group, "params": [self.masters.get(p, p) for p in group["params"]]} for group in groups])

    @property
    def param_groups(self) -> Groups:
        return self.inner.param_groups

    @property
    def state(self) -> Mapping[Tensor, dict[str, Any]]:
        """Of each parameter that is stepped (a copy, or the parameter itself)."""
        return self.inner.state

    @torch.no_grad()
    def step(self) -> None:
        for p in self.low:
            self.masters[p].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        self.inner.step()
        for p in self.low:
            p.copy_(self.masters[p])
            self.masters[p].grad = None

    def zero_grad(self) -> None:
        self.inner.zero_grad()
        for p in self.low:
            p.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "masters": [self.masters[p].detach() for p in self.low]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for p, master in zip(self.low, state["masters"], strict=True):
            self.masters[p].copy_(master)
        self.inner.load_state_dict({key: value for key, value in state.items() if key != "masters"})


def parameter_groups(model: LanguageModel, config: TrainConfig) -> Groups:
    """Groups of equal learning rate, decay and dtype. Each holds `lr_multiplier`, by which the schedule's rate is multiplied.

    Adapters: the method's multipliers (LoRA+), decay on matrices. Parameters of the base: the model's own rules, the multipliers
    with `--layerwise_lr 1`.
    """
    layers = adapters(model)
    groups: dict[tuple, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        path, _, last = name.rpartition(".")
        layer = layers.get(path)
        if isinstance(layer, AdapterLinear) and last not in ("weight", "bias"):
            multiplier, decays = layer.lr_multiplier(last, layer.config), p.squeeze().ndim >= 2
        else:
            multiplier, decays = model.lr_multiplier(name) if config.layerwise_lr else 1.0, model.decays(name)
        groups.setdefault((multiplier, decays, p.dtype), []).append(p)
    return [
        {
            "params": params,
            "lr": config.lr_init * multiplier,
            "lr_multiplier": multiplier,
            "weight_decay": config.weight_decay * decays,
        }
        for (multiplier, decays, _), params in groups.items()
    ]


def make_optimiser(model: LanguageModel, config: TrainConfig, masters: bool = True) -> Any:
    """`masters`: keep float32 copies of bf16 parameters (an engine that does so itself must not get them)."""
    groups, entry = parameter_groups(model, config), OPTIMISERS[config.optim]
    if masters:
        return MasterWeights(groups, lambda groups: entry.make(groups, config))
    return entry.make(groups, config)
