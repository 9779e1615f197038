"""A model without what `nn.Module` spends on each call and on each look at a parameter: a third of a small model's token.

A module finds its parameters and children through `__getattr__`, in Python, and looks for hooks at each call. The copy has them
in its own dict, and its call is its `forward`.
"""

import functools
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def direct(model: Module) -> Module:
    """A copy with the same tensors and the same `forward` methods, for forward passes while the model's modules stay as they are.

    A model with hooks, as ZeRO-3's, is returned itself.
    """
    hooked = any(getattr(module, hooks) for module in model.modules() for hooks in HOOKS)
    return model if hooked else _direct(model)


def _direct(module: Any) -> Any:
    kind: Any = type(module)
    copy = object.__new__(_class(kind))
    children = {name: child if child is None else _direct(child) for name, child in module._modules.items()}
    copy.__dict__.update(module.__dict__, **module._parameters, **module._buffers, **children, _modules=children)
    return copy


@functools.cache
def _class(kind: Any) -> Any:
    return type(kind.__name__, (kind,), {"__call__": kind.forward})
