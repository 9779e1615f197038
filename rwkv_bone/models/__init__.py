"""Models: one file each behind the seam of base.py. `MODELS` is the registry.

May be imported by everything but ops/, peft/ and data/.
"""

from collections.abc import Mapping

from torch import Tensor

from ..errors import UserError
from .base import USUAL, Execution, LanguageModel, Sizes, State
from .rwkv import version_of
from .x060 import RWKV6
from .x070 import RWKV7

MODELS: dict[str, type[LanguageModel]] = {model.version: model for model in (RWKV6, RWKV7)}


def recognise(tensors: Mapping[str, Tensor], source: str) -> type[LanguageModel]:
    """The model that a file's tensors belong to, by their names; UserError, naming `source`, if there is none."""
    for model in MODELS.values():
        if model.recognises(tensors):
            return model
    known = ", ".join(model.title for model in MODELS.values())
    version = version_of(tensors)
    what = f"an RWKV-{int(version[2])} model" if version else f"no model known here (its first tensor is {next(iter(tensors))})"
    raise UserError(f"{source}: wanted a model of {known}, this is {what}")


__all__ = ["MODELS", "USUAL", "Execution", "LanguageModel", "Sizes", "State", "recognise"]
