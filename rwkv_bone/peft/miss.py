"""MiSS (arXiv 2409.15371 from version 4; "bone" in RWKV-PEFT from November 2024, then "disha"): y = x W^T + (sum_j x_j) D.

x_j is the j-th r-wide piece of a token, D is (r, out). It is exactly a LoRA whose A is the r x r identity repeated to (r, in),
frozen, with B = D^T and scale 1. The tensor is called `bone` as in RWKV-PEFT: two dimensions tell it from Bone's three.

MiSS-mini (peft's `init_weights="mini"`) trains mini_r columns, (r, mini_r), and D is these repeated to (r, out).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import UserError
from .adapter import AdapterLinear, FrozenProduct, dense, option
from .bone import blocks


@dataclass(frozen=True)
class MissConfig(AdapterLinear.Config):
    mini_r: int = option(0, "MiSS-mini: columns of D, which are repeated along the outputs; 0: as many as outputs")

    def __post_init__(self):
        super().__post_init__()
        if self.mini_r < 0:
            raise UserError(f"mini_r must be at least 1, or 0 for plain MiSS, not {self.mini_r}")


class MissLinear(AdapterLinear):
    formula = "W'_oi = W_oi + D_(i mod r, o)"
    Config = MissConfig
    config: MissConfig

    def __init__(self, weight: Tensor, config: MissConfig):
        super().__init__(weight, config)
        out = weight.shape[0]
        columns = config.mini_r or out
        if out % columns:
            raise UserError(f"mini_r {columns} does not divide this layer's {out} outputs; take a divisor of every layer's")
        self.bone = self.new(config.r, columns)

    def repeated(self, columns: Tensor) -> Tensor:
        """(k, mini_r) repeated to (k, out); without mini_r the tensor itself."""
        times = self.weight.shape[0] // columns.shape[1]
        return columns if times == 1 else columns.repeat(1, times)

    def D(self) -> Tensor:
        """(r, out)."""
        return self.repeated(self.bone)

    def project(self, x: Tensor) -> Tensor:
        s = blocks(x, self.config.r).sum(1)  # (n, r)
        return FrozenProduct.apply(self.repeated(s @ self.bone.to(x.dtype)), x, self.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight = dense(self.weight).to(self.dtype)
        columns = torch.arange(weight.shape[1], device=weight.device) % self.config.r
        return weight + self.D()[columns].T
