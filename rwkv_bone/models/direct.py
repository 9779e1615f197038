"""A model without what `nn.Module` spends on each call and on each look at a parameter: a third of a small model's token.

A module finds its parameters and children through `__getattr__`, in Python, and looks for hooks at each call. The copy has them
in its own dict, and its call is its `forward`; or its `forward_one`, if it has that: then `prepare` puts more into the copy.
"""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
CALLS: dict[type, Callable] = {  # without torch's checks in Python
    nn.LayerNorm: lambda m, x: torch.layer_norm(x, m.normalized_shape, m.weight, m.bias, m.eps),
    nn.GroupNorm: lambda m, x: torch.group_norm(x, m.num_groups, m.weight, m.bias, m.eps),
}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def direct(model: Module) -> Module:
    """A copy that computes the same, for forward passes while the model stays as it is.

    A model with hooks, as ZeRO-3's, is returned itself.
    """
    hooked = any(getattr(module, hooks) for module in model.modules() for hooks in HOOKS)
    return model if hooked else _direct(model)


def _direct(module: Any) -> Any:
    kind: Any = type(module)
    copy = object.__new__(_class(kind))
    children = {name: child if child is None else _direct(child) for name, child in module._modules.items()}
    copy.__dict__.update(module.__dict__, **module._parameters, **module._buffers, **children, _modules=children)
    if hasattr(kind, "prepare"):
        copy.prepare()
    return copy


@functools.cache
def _class(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"__call__": CALLS.get(kind) or getattr(kind, "forward_one", kind.forward)})
