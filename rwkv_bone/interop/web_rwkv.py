"""RWKV-6 as web-rwkv (Ai00, RWKV-Runner's WebGPU mode) reads it: a safetensors file of float16, with two other names, and the
matrices of the two small LoRAs transposed. Source: cryscan/web-rwkv-converter, whose rules these are.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

RENAMED = {"time_faaaa": "time_first", "time_maa": "time_mix"}
TRANSPOSED = ("time_maa_w1", "time_maa_w2", "time_decay_w1", "time_decay_w2")


def web_name(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def web_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-2], shape[-1], shape[-2]) if name.endswith(TRANSPOSED) else shape


def web_tensor(name: str, tensor: Tensor) -> Tensor:
    """`name` is that of the .pth."""
    return tensor.transpose(-1, -2) if name.endswith(TRANSPOSED) else tensor


def from_web(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names and in the shapes of a .pth. A file that has the .pth's names already is left as it is."""
    if any("time_maa" in name for name in tensors):
        return dict(tensors)
    renamed = {}
    for name, tensor in tensors.items():
        for ours, theirs in RENAMED.items():
            name = name.replace(theirs, ours)
        renamed[name] = web_tensor(name, tensor) if tensor.dim() >= 2 else tensor
    return renamed


DTYPE = torch.float16  # the only one that it loads
