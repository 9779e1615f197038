"""DoRA (arXiv 2402.09353): y = m / |W + s B A| (x W^T + s x A^T B^T), the norm by rows and without gradient (section 4.3).

m starts as the row norms of W. Dropout acts on the input of A alone.
"""

import torch
from torch import Tensor

from .adapter import dense, row_panels
from .lora import LoraConfig, LoraLinear
from .rounding import rounded_product


class Gain(torch.autograd.Function):
    """y (n, out) times c (out,) of float32 or more, in y's dtype. c is near 1: y c rounded to the nearest bf16 would be y."""

    @staticmethod
    def forward(ctx, y: Tensor, c: Tensor) -> Tensor:
        ctx.save_for_backward(y, c)
        return rounded_product(y, c)

    @staticmethod
    def backward(ctx, g: Tensor):
        y, c = ctx.saved_tensors
        return (g * c).to(g.dtype), (g * y).sum(0, dtype=c.dtype)


class DoraLinear(LoraLinear):
    formula = "W' = m (W + alpha/r B A) / |W + alpha/r B A|_row"

    def __init__(self, weight: Tensor, config: LoraConfig):
        super().__init__(weight, config)
        self.lora_magnitude_vector = self.new(weight.shape[0])

    @torch.no_grad()
    def start(self) -> None:
        super().start()
        self.lora_magnitude_vector.copy_(self.row_norms())

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """|W + s B A| of each row, (out,). By panels: nothing of the weight's size is made, and nothing cancels."""
        w = dense(self.weight)
        return torch.cat([
            torch.addmm(w[rows].to(self.dtype), self.lora_B[rows], self.lora_A, alpha=self.scale).norm(dim=1)
            for rows in row_panels(len(w))
        ])  # fmt: skip

    def project(self, x: Tensor) -> Tensor:
        return Gain.apply(super().project(x), self.lora_magnitude_vector / self.row_norms())

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        return super().merged_weight() * (self.lora_magnitude_vector / self.row_norms()).unsqueeze(1)
