"""Bone, the weight guide in row layout (arXiv 2409.15371): W'_ij = W_ij + W_ij B_j + B_j for the r x r blocks of W.

It never needs W'. With x_j the j-th r-wide piece of a token, u_j = x_j B_j^T, s = sum_j u_j, and tile(s) repeating s over the
output blocks:

    y = (x + u) W^T + tile(s)
    backward, from g = dL/dy:  q = g W,  t = sum_i g_i,  du_j = q_j + t,  dx_j = q_j + du_j B_j,  dB_j = du_j^T x_j

One large product forward and one backward, as a frozen projection has; nothing of the weight's shape is made or kept.
Where r does not divide a size, x and q are padded with zeros and tile(s) is cut.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import AdapterLinear, ceil_div


def blocks(x: Tensor, r: int) -> Tensor:
    """(n, width) -> (n, ceil(width / r), r), padded with zeros."""
    return F.pad(x, (0, -x.shape[1] % r)).unflatten(1, (-1, r))


def add_tiled(y: Tensor, s: Tensor) -> Tensor:
    """Add s (n, r) to every r-wide block of y (n, out), in place; the last block takes what fits."""
    out, r = y.shape[1], s.shape[1]
    whole = out // r * r
    y[:, :whole].unflatten(1, (-1, r)).add_(s.unsqueeze(1))
    y[:, whole:].add_(s[:, : out - whole])
    return y


class BoneFunction(torch.autograd.Function):
    """x (n, in), weight (out, in), bone (m, r, r) with m = ceil(in / r) -> y (n, out) in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bone: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, bone)
        r = bone.shape[-1]
        u = torch.einsum("nji,jki->njk", blocks(x, r), bone.to(x.dtype))  # (n, m, r)
        y = (x + u.flatten(1)[:, : x.shape[1]]) @ weight.T
        return add_tiled(y, u.sum(1))

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight, bone = ctx.saved_tensors
        r = bone.shape[-1]
        q = blocks(g @ weight, r)  # (n, m, r)
        du = q + blocks(g, r).sum(1, keepdim=True)
        dx = dbone = None
        if ctx.needs_input_grad[0]:
            dx = q.add_(torch.einsum("njk,jki->nji", du, bone.to(x.dtype))).flatten(1)[:, : x.shape[1]]
        if ctx.needs_input_grad[2]:
            dbone = torch.einsum("njk,nji->jki", du, blocks(x, r)).to(bone.dtype)
        return dx, None, dbone


class BoneLinear(AdapterLinear):
    formula = "W'_ij = W_ij + W_ij B_j + B_j"

    def __init__(self, weight: Tensor, config: AdapterLinear.Config):
        super().__init__(weight, config)
        self.bone = self.new(ceil_div(weight.shape[1], config.r), config.r, config.r)

    def forward(self, x: Tensor) -> Tensor:
        return BoneFunction.apply(x.flatten(0, -2), self.weight, self.bone).unflatten(0, x.shape[:-1])

    def merged_weight(self) -> Tensor:
        out, in_ = self.weight.shape
        r = self.config.r
        weight = self.weight.to(self.dtype)
        padded = blocks(weight, r)  # (out, m, r)
        update = torch.einsum("ojk,jki->oji", padded, self.bone)
        rows = torch.arange(out, device=weight.device) % r
        return weight + (update + self.bone[:, rows].transpose(0, 1)).flatten(1)[:, :in_]
