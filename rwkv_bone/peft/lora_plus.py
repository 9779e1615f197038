"""LoRA+ (arXiv 2402.12354): LoRA whose B learns faster than its A."""

from dataclasses import dataclass

from ..errors import UserError
from .adapter import AdapterLinear, option
from .lora import LoraConfig, LoraLinear


@dataclass(frozen=True)
class LoraPlusConfig(LoraConfig):
    lr_ratio: float = option(16.0, "learning rate of B, in multiples of that of A")

    def __post_init__(self):
        super().__post_init__()
        if not self.lr_ratio > 0:
            raise UserError(f"lr_ratio must be above 0, not {self.lr_ratio}")


class LoraPlusLinear(LoraLinear):
    formula = "W' = W + alpha/r B A, lr(B) = lr_ratio lr(A)"
    Config = LoraPlusConfig

    @classmethod
    def lr_multiplier(cls, name: str, config: AdapterLinear.Config) -> float:
        assert isinstance(config, LoraPlusConfig)
        return config.lr_ratio if name == "lora_B" else 1.0
