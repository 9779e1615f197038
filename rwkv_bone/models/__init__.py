"""Models: one file each behind the seam of base.py. `MODELS` is the registry.

May be imported by everything but ops/, peft/ and data/.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..errors import UserError
from .base import USUAL, Execution, LanguageModel, Sizes, State
from .hf import HF
from .rwkv import version_of
from .x060 import RWKV6
from .x070 import RWKV7

MODELS: dict[str, type[LanguageModel]] = {model.version: model for model in (RWKV6, RWKV7, HF)}


def recognise(tensors: Mapping[str, Tensor], source: str, config: Mapping[str, Any] | None = None) -> type[LanguageModel]:
    """The model that tensors belong to, by their names, or by the config.json of their folder; UserError, naming `source`."""
    for model in MODELS.values():
        if model.recognises(tensors) if config is None else model.recognises_config(config):
            return model
    if config is not None:
        raise UserError(f"{source}: its config.json has no model_type; wanted a folder of Hugging Face transformers")
    known = ", ".join(model.title for model in MODELS.values())
    version = version_of(tensors)
    what = f"an RWKV-{int(version[2])} model" if version else f"no model known here (its first tensor is {next(iter(tensors))})"
    raise UserError(f"{source}: wanted a model of {known}, this is {what}")


__all__ = ["MODELS", "USUAL", "Execution", "LanguageModel", "Sizes", "State", "recognise"]
