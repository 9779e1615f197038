"""PEFT methods. `METHODS` is the registry: one file and one line for each."""

from .adapter import PROJECTIONS, TRAIN_PARTS, AdapterLinear, adapter_tensors, adapters, attach, inject, merge, train_parts
from .bone import BoneLinear

METHODS: dict[str, type[AdapterLinear]] = {
    "bone": BoneLinear,
}

__all__ = [
    "METHODS",
    "PROJECTIONS",
    "TRAIN_PARTS",
    "AdapterLinear",
    "adapter_tensors",
    "adapters",
    "attach",
    "inject",
    "merge",
    "train_parts",
]
