"""The loss: cross entropy of the head over the trained positions alone, in chunks, so that B*T*V logits never exist.

Sums, not means: what is divided, and by how many tokens, is decided once for a whole step over all micro batches and devices.
"""

import torch
from torch import Tensor

CHUNK_BYTES = 64 << 20  # of float32 logits at a time
L2WRAP = 1e-4  # RWKV-LM: pulls each position's largest logit towards zero with this gradient, per position of the mean


class HeadCrossEntropy(torch.autograd.Function):
    """hidden (n, C), weight (V, C), targets (n) -> sum of the cross entropies, a float32 scalar.

    The gradients are made in the forward pass, chunk by chunk, so each logit is computed once. The weight's is skipped
    where the head is frozen.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: bool) -> Tensor:
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        compute = torch.promote_types(hidden.dtype, torch.float32)
        rows = max(1, CHUNK_BYTES // (4 * len(weight)))
        total = torch.zeros((), dtype=compute, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=compute) if wants_weight else None
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            logits = (hidden[piece] @ weight.T).to(compute)  # (rows, V)
            target = targets[piece].unsqueeze(1)
            largest, place = logits.max(1, keepdim=True)
            target_logit = logits.gather(1, target) - largest
            grad = logits.sub_(largest).exp_()
            normaliser = grad.sum(1, keepdim=True)
            total += (normaliser.log() - target_logit).sum()
            if not (wants_hidden or wants_weight):
                continue
            grad /= normaliser
            grad.scatter_add_(1, target, -torch.ones_like(target, dtype=compute))
            if l2wrap:
                grad.scatter_add_(1, place, L2WRAP * largest)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[piece] = grad @ weight
            if grad_weight is not None:
                grad_weight += grad.T @ hidden[piece]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, g: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * g.to(grad_hidden.dtype) if grad_hidden is not None else None,
            (grad_weight * g).to(ctx.weight_dtype) if grad_weight is not None else None,
            None,
            None,
        )


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, l2wrap: bool = False) -> Tensor:
    """Sum of the cross entropies of `hidden @ weight.T` (B, T, V) over the positions whose target is not negative.

    hidden (B, T, C), weight (V, C), targets (B, T) int64 with negative values where nothing is trained. No such position
    gives 0 with zero gradients. l2wrap adds RWKV-LM's L2Wrap to the gradient, not to the value.
    """
    trained = targets.flatten() >= 0
    return HeadCrossEntropy.apply(hidden.flatten(0, 1)[trained], weight, targets.flatten()[trained], l2wrap)
