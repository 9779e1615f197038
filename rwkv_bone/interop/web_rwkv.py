"""Models and states as web-rwkv (Ai00, RWKV-Runner's WebGPU mode) reads them: a safetensors file of float16 with some names and
layouts of its own, which a model states as its `web_names`. Source: web-rwkv's converters.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import UserError
from ..models.base import LanguageModel, WebNames

DTYPE = torch.float16  # the only one that it loads


def web_name(names: WebNames, name: str) -> str:
    for ours, theirs in names.renamed.items():
        name = name.replace(ours, theirs)
    return name


def web_shape(names: WebNames, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """`name` is the one here."""
    return (*shape[:-2], shape[-1], shape[-2]) if name.endswith(names.transposed) else shape


def web_tensor(names: WebNames, name: str, tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2) if name.endswith(names.transposed) and tensor.dim() >= 2 else tensor


def from_web(tensors: Mapping[str, Tensor], kinds: Iterable[type[LanguageModel]]) -> dict[str, Tensor]:
    """A safetensors file's tensors under the names and in the layout of a `.pth`, if they are web-rwkv's of one of those models.

    A file that has a `.pth`'s names where web-rwkv's are others is left as it is; where both are the same, shapes tell.
    """
    for kind in kinds:
        if (names := kind.web_names) is None:
            continue
        found = {}
        for name, tensor in tensors.items():
            for ours, theirs in names.renamed.items():
                name = name.replace(theirs, ours)
            found[name] = web_tensor(names, name, tensor)
        if kind.recognises(found) and not (kind.recognises(tensors) and (names.renamed or is_whole(kind, tensors))):
            return found
    return dict(tensors)


def is_whole(kind: type[LanguageModel], tensors: Mapping[str, Tensor]) -> bool:
    """Whether the tensors are a model of that kind as they are."""
    try:
        kind.sizes_of({kind.parameter_name(name): tensor for name, tensor in tensors.items()}, "")
    except UserError:
        return False
    return True
