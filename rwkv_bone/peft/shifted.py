"""What PiSSA, OLoRA and LoRA-GA share: a LoRA that starts at factors B0 A0 which are not zero, and an update that is.

Their papers subtract s B0 A0 from the base. Here the base stays as its file has it, and the adapter keeps B0 and A0:

    W' = W + s (B A - B0 A0) = W + s ((B - B0) A + B0 (A - A0)),

a LoRA of rank 2r with the same gradients. The last form cancels nothing: a fresh adapter equals the base exactly, and in bf16 a
small step away from B0 is not lost beside it. The stored names are RWKV-PEFT's.
"""

import torch
from torch import Tensor

from ..errors import UserError
from .lora import LoraLinear, RankConfig


class ShiftedLoraLinear(LoraLinear):
    formula = "W' = W + alpha/r (B A - B0 A0)"
    Config = RankConfig
    init_lora_A: Tensor
    init_lora_B: Tensor

    def __init__(self, weight: Tensor, config: RankConfig):
        super().__init__(weight, config)
        if config.r > min(weight.shape):
            raise UserError(f"r={config.r} is more than the rank of a weight of {tuple(weight.shape)}; give a smaller r")
        self.register_buffer("init_lora_A", torch.zeros_like(self.lora_A, requires_grad=False))
        self.register_buffer("init_lora_B", torch.zeros_like(self.lora_B, requires_grad=False))

    @torch.no_grad()
    def start_at(self, A: Tensor, B: Tensor) -> None:
        """Begin at A (r, in) and B (out, r)."""
        for parameter, buffer, value in ((self.lora_A, self.init_lora_A, A), (self.lora_B, self.init_lora_B, B)):
            parameter.copy_(value)
            buffer.copy_(parameter)

    def factors(self) -> tuple[Tensor, Tensor]:
        A, B, A0, B0 = self.lora_A, self.lora_B, self.init_lora_A, self.init_lora_B
        return torch.cat([A, A - A0]), torch.cat([B - B0, B0], 1)
