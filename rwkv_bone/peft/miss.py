"""MiSS (arXiv 2409.15371 from version 4; "bone" in RWKV-PEFT from November 2024, then "disha"): y = x W^T + (sum_j x_j) D.

x_j is the j-th r-wide piece of a token, D is (r, out). It is exactly a LoRA whose A is the r x r identity repeated to (r, in),
frozen, with B = D^T and scale 1. The tensor is called `bone` as in RWKV-PEFT: two dimensions tell it from Bone's three.
"""

import torch
from torch import Tensor

from .adapter import AdapterLinear, FrozenProduct, dense
from .bone import blocks


class MissLinear(AdapterLinear):
    formula = "W'_oi = W_oi + D_(i mod r, o)"

    def __init__(self, weight: Tensor, config: AdapterLinear.Config):
        super().__init__(weight, config)
        self.bone = self.new(config.r, weight.shape[0])

    def project(self, x: Tensor) -> Tensor:
        s = blocks(x, self.config.r).sum(1)  # (n, r)
        return FrozenProduct.apply(s @ self.bone.to(x.dtype), x, self.weight)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight = dense(self.weight).to(self.dtype)
        columns = torch.arange(weight.shape[1], device=weight.device) % self.config.r
        return weight + self.bone[columns].T
