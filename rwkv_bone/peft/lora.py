"""LoRA (arXiv 2106.09685): y = x W^T + s (x A^T) B^T with A (r, in), B (out, r), s = alpha / r; and what its variants share."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .adapter import AdapterLinear, FrozenProduct, dense, option


@dataclass(frozen=True)
class RankConfig(AdapterLinear.Config):
    r: int = option(32, "rank")
    alpha: float = option(0.0, "scale: the update is alpha/r B A; 0: alpha = r")

    def __post_init__(self):
        super().__post_init__()
        if self.alpha < 0 or not math.isfinite(self.alpha):
            raise UserError(f"alpha must be positive, or 0 for alpha = r, not {self.alpha}")
        if self.alpha == 0:
            object.__setattr__(self, "alpha", float(self.r))  # explicit, so that files say it


@dataclass(frozen=True)
class LoraConfig(RankConfig):
    lora_dropout: float = option(0.0, "share of the inputs of A that each training step drops")

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout must be at least 0 and below 1, not {self.lora_dropout}")


class LoraLinear(AdapterLinear):
    formula = "W' = W + alpha/r B A"
    Config: type[RankConfig] = LoraConfig
    config: RankConfig

    def __init__(self, weight: Tensor, config: RankConfig):
        super().__init__(weight, config)
        out, in_ = weight.shape
        self.lora_A = self.new(config.r, in_)
        self.lora_B = self.new(out, config.r)

    @property
    def scale(self) -> float:
        return self.config.alpha / self.config.r

    @torch.no_grad()
    def start(self) -> None:
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.lora_B.zero_()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (k, in) and B (out, k): the update of the weight is scale B A."""
        return self.lora_A, self.lora_B

    def project(self, x: Tensor) -> Tensor:
        A, B = self.factors()
        dropped = F.dropout(x, getattr(self.config, "lora_dropout", 0.0), self.training)
        h = dropped @ A.to(x.dtype).T  # (n, k)
        return FrozenProduct.apply(h @ (self.scale * B).to(x.dtype).T, x, self.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        A, B = self.factors()
        return torch.addmm(dense(self.weight).to(self.dtype), B, A, alpha=self.scale)
