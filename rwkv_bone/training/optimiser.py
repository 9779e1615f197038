"""AdamW for what trains: groups by learning rate and weight decay, and float32 masters of parameters kept in bf16."""

import torch
from torch import Tensor, nn

from ..peft import AdapterLinear, adapters


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps a float32 copy of each bf16 parameter, steps that, and rounds it into the parameter.

    In bf16 alone a step smaller than 2^-9 of a weight would be lost. Float32 parameters, such as
    adapters, are stepped as they are.
    """

    def __init__(self, groups: list[dict], **defaults):
        self.low = [p for group in groups for p in group["params"] if p.dtype in (torch.bfloat16, torch.float16)]
        self.masters = {p: nn.Parameter(p.detach().float()) for p in self.low}
        groups = [{**group, "params": [self.masters.get(p, p) for p in group["params"]]} for group in groups]
        super().__init__(groups, **defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.low:
            self.masters[p].grad = None if p.grad is None else p.grad.float()
            p.grad = None
        loss = super().step(closure)
        for p in self.low:
            p.copy_(self.masters[p])
            self.masters[p].grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for p in self.low:
            p.grad = None

    def state_dict(self):
        return {**super().state_dict(), "masters": [self.masters[p].detach() for p in self.low]}

    @torch.no_grad()
    def load_state_dict(self, state):
        for p, master in zip(self.low, state["masters"], strict=True):
            self.masters[p].copy_(master)
        super().load_state_dict({key: value for key, value in state.items() if key != "masters"})


def parameter_groups(model: nn.Module, lr: float, weight_decay: float, layerwise_lr: bool) -> list[dict]:
    """Groups of equal learning rate, decay and dtype. Each holds `lr_multiplier`, by which the schedule's rate is multiplied.

    Multipliers: the method's own (LoRA+), and RWKV-LM's doubled rate of time_decay. Decay on matrices alone.
    """
    layers = adapters(model)
    groups: dict[tuple, list[Tensor]] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        path, _, last = name.rpartition(".")
        layer = layers.get(path)
        multiplier = layer.lr_multiplier(last, layer.config) if isinstance(layer, AdapterLinear) else 1.0
        if layerwise_lr and last == "time_decay":
            multiplier *= 2
        groups.setdefault((multiplier, p.squeeze().ndim >= 2, p.dtype), []).append(p)
    return [
        {"params": params, "lr": lr * multiplier, "lr_multiplier": multiplier, "weight_decay": weight_decay * decays}
        for (multiplier, decays, _), params in groups.items()
    ]


def make_optimiser(model: nn.Module, config, masters: bool = True) -> torch.optim.Optimizer:
    """`masters`: keep float32 copies of bf16 parameters (an engine that does so itself must not get them)."""
    groups = parameter_groups(model, config.lr_init, config.weight_decay, config.layerwise_lr == 1)
    kind = MasterAdamW if masters else torch.optim.AdamW
    return kind(groups, lr=config.lr_init, betas=(config.beta1, config.beta2), eps=config.adam_eps, fused=True)
