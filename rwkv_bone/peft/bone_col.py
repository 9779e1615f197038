"""Bone in column layout: W'_ij = W_ij + W_ij B_i + B_i, one block per *output* block row (arXiv 2409.15371, its LLaMA runs).

Hugging Face peft has it as `MissConfig(init_weights="bat")`. It has no activation form: B_i acts inside the sum over the input,
between W and x. So W' is made panel by panel, used, and made again in backward; only x, W and B are kept. For n tokens that
costs 6 n in out + 6 in out r multiplications forward and backward, against 4 n in out + 6 n in r of the row layout.

The tensor's name tells the layouts apart: on a square weight both have the same shape and mean different models.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .adapter import AdapterLinear, ceil_div, dense
from .bone import blocks
from .rounding import add_rounded_

PANEL, PANELS = 256, 8  # W' is made by so many rows at once, or r, or an eighth of all if that is more


def panels(w: Tensor, bone: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Cut w (out, in) by rows: the rows, their blocks (k, r, m, r) padded with zeros, their B (k, r, r)."""
    r = bone.shape[-1]
    at_once = max(1, PANEL // r, ceil_div(len(bone), PANELS))
    for first in range(0, len(bone), at_once):
        b = bone[first : first + at_once].to(w.dtype)
        rows = slice(first * r, min((first + at_once) * r, len(w)))
        panel = blocks(w[rows], r)
        missing = len(b) * r - len(panel)
        yield rows, (F.pad(panel, (0, 0, 0, 0, 0, missing)) if missing else panel).unflatten(0, (-1, r)), b


def adapted(w: Tensor, panel: Tensor, b: Tensor) -> Tensor:
    """The rows of W' that belong to the rows w (rows, in), from what `panels` gives for them."""
    update = (panel.flatten(1, 2) @ b).view(panel.shape).flatten(0, 1).flatten(1)
    return add_rounded_(update[: len(w), : w.shape[1]], w, b.flatten(0, 1)[: len(w)])


class BoneColFunction(torch.autograd.Function):
    """x (n, in), weight (out, in), bone (ceil(out / r), r, r) -> y (n, out) in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bone: Tensor) -> Tensor:
        ctx.save_for_backward(x, bone)
        ctx.weight = weight
        w = dense(weight, x.dtype)
        y = x.new_empty(len(x), len(w))
        for rows, panel, b in panels(w, bone):
            torch.mm(x, adapted(w[rows], panel, b).T, out=y[:, rows])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, bone = ctx.saved_tensors
        w = dense(ctx.weight, x.dtype)
        r = bone.shape[-1]
        wants_dx, _, wants_dbone = ctx.needs_input_grad
        dx = torch.zeros_like(x) if wants_dx else None
        dbone = []
        for rows, panel, b in panels(w, bone):
            if dx is not None:
                dx.addmm_(g[:, rows], adapted(w[rows], panel, b))
            if wants_dbone:
                dw = blocks(g[:, rows].T @ x, r)  # (rows, m, r), of W'
                dw = F.pad(dw, (0, 0, 0, 0, 0, len(b) * r - len(dw))).unflatten(0, (-1, r))  # (k, r, m, r)
                dbone.append(panel.flatten(1, 2).transpose(1, 2) @ dw.flatten(1, 2) + dw.sum(2))
        return dx.to(x.dtype) if dx is not None else None, None, torch.cat(dbone).to(bone.dtype) if wants_dbone else None


class BoneColLinear(AdapterLinear):
    formula = "W'_ij = W_ij + W_ij B_i + B_i"

    def __init__(self, weight: Tensor, config: AdapterLinear.Config):
        super().__init__(weight, config)
        self.bone_col = self.new(ceil_div(weight.shape[0], config.r), config.r, config.r)

    def project(self, x: Tensor) -> Tensor:
        return BoneColFunction.apply(x, self.weight, self.bone_col)

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        weight = dense(self.weight).to(self.dtype)
        return torch.cat([adapted(weight[rows], panel, b) for rows, panel, b in panels(weight, self.bone_col)])
