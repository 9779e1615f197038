"""rsLoRA (arXiv 2312.03732): LoRA with the scale alpha / sqrt(r), under which activations keep their size at any rank."""

import math
from dataclasses import dataclass

from .adapter import option
from .lora import LoraConfig, LoraLinear


@dataclass(frozen=True)
class RsLoraConfig(LoraConfig):
    alpha: float = option(16.0, "scale: the update is alpha/sqrt(r) B A; 0: alpha = r")


class RsLoraLinear(LoraLinear):
    formula = "W' = W + alpha/sqrt(r) B A"
    Config = RsLoraConfig

    @property
    def scale(self) -> float:
        return self.config.alpha / math.sqrt(self.config.r)
