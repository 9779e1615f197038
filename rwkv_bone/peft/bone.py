"""Bone, the weight guide in row layout (arXiv 2409.15371): W'_ij = W_ij + W_ij B_j + B_j for the r x r blocks of W.

It need not make W'. With x_j the j-th r-wide piece of a token, u_j = x_j B_j^T, s = sum_j u_j, and tile(s) repeating s over the
output blocks:

    y = (x + u) W^T + tile(s)
    backward, from g = dL/dy:  q = g W,  t = sum_i g_i,  du_j = q_j + t,  dx_j = q_j + du_j B_j,  dB_j = du_j^T x_j

One large product forward and one backward, as a frozen projection has, and 3 n in r multiplications more for n tokens, against
2 n in out for those two. Nothing of the weight's shape is made or kept. Where r does not divide a size, x and q are padded with
zeros and tile(s) is cut. For many tokens there is a form of fewer operations, in float32 on the CPU: rwkv_bone/ops/bone/cpu.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.bone import cpu as bone_cpu
from ..ops.bone import cuda as bone_cuda
from .adapter import AdapterLinear, ceil_div, dense, row_panels
from .rounding import add_rounded_


def blocks(x: Tensor, r: int) -> Tensor:
    """(n, width) -> (n, ceil(width / r), r), a view where r divides, else a copy padded with zeros."""
    missing = -x.shape[1] % r
    return (F.pad(x, (0, missing)) if missing else x).unflatten(1, (-1, r))


def tile_into(y: Tensor, s: Tensor) -> Tensor:
    """Fill every r-wide block of y (n, out) with s (n, r); the last block takes what fits."""
    out, r = y.shape[1], s.shape[1]
    whole = out // r * r
    y[:, :whole].unflatten(1, (-1, r)).copy_(s.unsqueeze(1))
    y[:, whole:].copy_(s[:, : out - whole])
    return y


def add_products(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (m, r, r) += a_j^T b_j for every block j of a, b (n, m, r)."""
    if not a.is_cpu:
        total += torch.bmm(a.permute(1, 2, 0), b.transpose(0, 1))
    else:  # one by one: the CPU's batched product of bf16 is ten times slower with these strides
        for j in range(len(total)):
            total[j] += a[:, j].T @ b[:, j]


def chunks(x: Tensor) -> list[slice]:
    """Slices of the tokens of x (n, in), the longest first: as many at once as fill the device, for small temporaries."""
    n, in_ = x.shape
    size = max(1, (2**22 if x.device.type == "cpu" else 2**24) // in_)
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


class BoneFunction(torch.autograd.Function):
    """x (n, in), weight (out, in), bone (m, r, r) with m = ceil(in / r) -> y (n, out) in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight, bone: Tensor) -> Tensor:
        ctx.save_for_backward(x, bone)
        ctx.weight = weight
        in_, (m, r, _) = x.shape[1], bone.shape
        w = dense(weight, x.dtype)
        if bone_cpu.fits(x, r):
            return bone_cpu.forward(x, w, bone)
        transposed = bone.to(x.dtype).transpose(1, 2)
        y = x.new_empty(len(x), len(w))
        fused = bone_cuda.fits(x, None, len(w), r)
        workspace = None  # one for all chunks: fresh memory costs the CPU more than what is done in it
        for rows in chunks(x):
            xs = x[rows]
            workspace = x.new_empty(len(xs), m, r) if workspace is None else workspace
            u = workspace[: len(xs)]
            torch.bmm(blocks(xs, r).transpose(0, 1), transposed, out=u.transpose(0, 1))
            ys, xu = y[rows], u.flatten(1)[:, :in_]
            if fused:
                bone_cuda.forward(xs, u, ys)
            else:
                tile_into(ys, u.sum(1))
                add_rounded_(xu, xs)
            # the product is added to the tiles before it is rounded: s is small beside it at the start of a training
            ys.addmm_(xu, w.T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g: Tensor):
        x, bone = ctx.saved_tensors
        g = g.contiguous()
        in_, r = x.shape[1], bone.shape[-1]
        w = dense(ctx.weight, x.dtype)
        wants_dx, _, wants_dbone = ctx.needs_input_grad
        if bone_cpu.fits(x, r):
            by_kernels = bone_cpu.backward(x, w, bone, g, wants_dx)
            return by_kernels[0], None, by_kernels[1]
        b = bone.to(x.dtype)
        fused = bone_cuda.fits(x, g, len(w), r)
        dx = torch.empty_like(x) if wants_dx else None
        dbone = torch.zeros_like(bone) if wants_dbone else None
        workspace = None
        for rows in chunks(x):
            q = blocks(torch.mm(g[rows], w, out=dx[rows] if dx is not None else None), r)  # (n, m, r); of dx itself if r divides
            workspace = torch.empty_like(q) if workspace is None else workspace
            du = workspace[: len(q)]
            if fused:
                bone_cuda.backward(g[rows], q, du)
            else:
                torch.add(q, blocks(g[rows], r).sum(1, keepdim=True), out=du)
            if dbone is not None:
                add_products(dbone, du, blocks(x[rows], r))
            if dx is not None:
                q.transpose(0, 1).baddbmm_(du.transpose(0, 1), b)
                if in_ % r:
                    dx[rows] = q.flatten(1)[:, :in_]
        return dx, None, dbone


class BoneLinear(AdapterLinear):
    formula = "W'_ij = W_ij + W_ij B_j + B_j"

    def __init__(self, weight: Tensor, config: AdapterLinear.Config):
        super().__init__(weight, config)
        self.bone = self.new(ceil_div(weight.shape[1], config.r), config.r, config.r)

    def project(self, x: Tensor) -> Tensor:
        return BoneFunction.apply(x.contiguous(), self.weight, self.bone)

    @staticmethod
    def kernels(device: str, dtype: torch.dtype) -> str:
        if device != "cuda" or dtype != torch.bfloat16:
            return ""
        return f"Bone: {bone_cuda.describe(torch.device('cuda', torch.cuda.current_device()))}"

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        merged = torch.empty(self.weight.shape, dtype=self.dtype, device=self.weight.device)
        for rows, panel in self.merged_panels():
            merged[rows] = panel
        return merged

    @torch.no_grad()
    def merged_panels(self) -> Iterator[tuple[slice, Tensor]]:
        weight = dense(self.weight)
        (out, in_), r = weight.shape, self.config.r
        size = min(out, max(r, 64 // r * r))  # of a panel of rows, which stays in the cache
        tiled = self.bone[:, torch.arange(size, device=weight.device) % r]  # (m, size, r)
        buffer, products = self.bone.new_empty(size, in_), torch.empty_like(tiled)  # fresh memory costs more than the work in it
        for rows in row_panels(out, size):
            n = rows.stop - rows.start
            panel = buffer[:n].copy_(weight[rows])
            pieces = blocks(panel, r).transpose(0, 1)  # (m, n, r): of the panel itself if r divides
            pieces += torch.bmm(pieces, self.bone, out=products[:, :n]).add_(tiled[:, :n])
            if in_ % r:
                panel.copy_(pieces.transpose(0, 1).flatten(1)[:, :in_])
            yield rows, panel
