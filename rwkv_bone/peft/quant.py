"""Base weights in 8 or 4 bits, frozen: `int8`, scaled by row, and `nf4` (QLoRA, arXiv 2305.14314), through bitsandbytes.

A quantised weight stands for a dense one, which it makes when a product needs it and which then goes again: one projection's
weight at a time, in forward and once more in backward. Adapters of every method work on it as on a dense one.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import UserError
from .adapter import FrozenLinear, QuantisedWeight, projections, weight_and_bias

BLOCK = 64  # numbers of nf4 that share a scale


class Int8Weight(QuantisedWeight):
    """W_oi = scale_o n_oi with whole n_oi in -127 ... 127."""

    numbers: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor):
        scale = (weight.abs().amax(1, keepdim=True).float() / 127).to(weight.dtype)
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)  # a row of zeros
        numbers = (weight.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        super().__init__(weight, numbers=numbers, scale=scale)

    def dense(self) -> Tensor:
        return self.numbers.view(torch.int8).to(self.dtype).mul_(self.scale.view(self.dtype))


class Nf4Weight(QuantisedWeight):
    """Each number is one of 16 quantiles of the normal distribution, times the largest of its block of 64."""

    numbers: Tensor
    scale: Tensor
    code: Tensor

    def __init__(self, weight: Tensor):
        numbers, state = bitsandbytes().quantize_4bit(weight.contiguous(), blocksize=BLOCK, quant_type="nf4")
        super().__init__(weight, numbers=numbers, scale=state.absmax, code=state.code)

    def dense(self) -> Tensor:
        functional = bitsandbytes()
        state = functional.QuantState(
            absmax=self.scale.view(torch.float32),
            shape=self.shape,
            code=self.code.view(torch.float32),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return functional.dequantize_4bit(self.numbers, state)


KINDS: dict[str, type[QuantisedWeight]] = {"int8": Int8Weight, "nf4": Nf4Weight}


def bitsandbytes():
    try:
        import bitsandbytes.functional
    except ImportError:
        raise UserError("nf4 needs bitsandbytes; pip install 'rwkv-bone[quant]'") from None
    return bitsandbytes.functional


@torch.no_grad()
def quantise(weight: Tensor, kind: str) -> QuantisedWeight:
    """A dense weight (out, in) in bf16 or float32 as one of `KINDS`."""
    if kind not in KINDS:
        raise UserError(f"{kind}: unknown kind of quantisation; there are {', '.join(KINDS)}")
    return KINDS[kind](weight.detach())


def quantise_model(model: nn.Module, kind: str, parts: Iterable[str] | None = None) -> list[str]:
    """Quantise the linear layers within `parts`, one by one, before adapters are put on them; return their names."""
    names = projections(model, parts)
    for name in names:
        weight, bias = weight_and_bias(model, name)
        assert isinstance(weight, Tensor)
        model.set_submodule(name, FrozenLinear(quantise(weight, kind), bias))
    return names
