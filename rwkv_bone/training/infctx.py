"""Long context in the memory of a short one: a sequence in chunks with carried state, exact gradients or truncated ones.

Exact: one pass forward keeps nothing but the state at each border; then, from the last chunk to the first, each chunk is run
again from its border and taken backward together with the gradient that the next chunk sent to its final state. That is
backpropagation through the whole sequence at the price of a second forward pass, and the activations of one chunk at a time.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..models.x060 import LayerState, State

Forward = Callable[[dict[str, Tensor], State | None], tuple[Tensor, State]]


def detached(state: State, requires_grad: bool = False) -> State:
    return [LayerState(*(t.detach().requires_grad_(requires_grad) for t in layer)) for layer in state]


def backward_in_chunks(
    forward: Forward, micro: dict[str, Tensor], chunk: int, truncate: bool, backward: Callable[[Tensor, bool], None]
) -> Tensor:
    """Run micro["idx"] (B, T) in pieces of `chunk` tokens and add its gradients; returns the summed loss.

    `forward(piece, state)` gives a piece's summed loss and the state after it. `backward(loss, last)` scales a summed loss and
    takes it backward; `last` marks the final call. truncate cuts the gradient at the borders (cheaper: no second pass, no state
    kept).
    """
    pieces: list[dict[str, Tensor]] = [
        {name: micro[name][:, start : start + chunk] for name in ("idx", "targets", "reset") if name in micro}
        for start in range(0, micro["idx"].shape[1], chunk)
    ]
    total: Tensor | float = 0.0
    if truncate:
        state: State | None = None
        for i, piece in enumerate(pieces):
            loss, end = forward(piece, state)
            state = detached(end)
            backward(loss, i == len(pieces) - 1)
            total += loss.detach()
        assert isinstance(total, Tensor)  # of one piece at least
        return total

    borders: list[State | None] = [None]
    with torch.no_grad():
        for piece in pieces[:-1]:
            untrained = {**piece, "targets": torch.full_like(piece["targets"], -100)}  # the head has nothing to do
            borders.append(forward(untrained, borders[-1])[1])
    from_next: list[Tensor | None] = []  # the gradient of the final state, from the chunk behind
    for i in reversed(range(len(pieces))):
        border = borders.pop()
        start = None if border is None else detached(border, requires_grad=True)
        loss, end = forward(pieces[i], start)
        total += loss.detach()
        if from_next:
            end_tensors = [t for layer in end for t in layer]
            loss = ThroughState.apply(loss, from_next, *end_tensors)
        backward(loss, i == 0)
        from_next = [] if start is None else [t.grad for layer in start for t in layer]
    assert isinstance(total, Tensor)
    return total


class ThroughState(torch.autograd.Function):
    """The loss itself; backward also hands each final-state tensor the (already scaled) gradient that arrived from behind."""

    @staticmethod
    def forward(ctx, loss: Tensor, gradients: list[Tensor | None], *end: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx, g: Tensor):
        return g, None, *ctx.gradients
