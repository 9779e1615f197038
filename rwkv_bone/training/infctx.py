"""Long context in the memory of a short one: a sequence in chunks with carried state, exact gradients or truncated ones.

Exact: one pass forward keeps nothing but the state at each border; then, from the last chunk to the first, each chunk is run
again from its border and taken backward together with the gradient that the next chunk sent to its final state. That is
backpropagation through the whole sequence at the price of a second forward pass, and the activations of one chunk at a time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.base import State, detach, tensors_of
from ..ops.recompute import GivenGradients

Micro = dict[str, Tensor]
Forward = Callable[[Micro, State], tuple[Tensor, State]]  # a piece and the state before it -> its summed loss, the state after it


def pieces_of(micro: Micro, chunk: int) -> list[Micro]:
    """A micro batch (B, T) cut into pieces of `chunk` tokens."""
    names = [name for name in ("idx", "targets", "reset") if name in micro]
    return [{name: micro[name][:, at : at + chunk] for name in names} for at in range(0, micro["idx"].shape[1], chunk)]


def equal_lengths(micro_batches: list[Micro], largest: Callable[[Tensor], Tensor]) -> list[Micro]:
    """Pad each micro batch to the longest of its number on any device: engines that divide weights need as many chunks on all.

    `largest`: elementwise maximum over the devices.
    """
    lengths = largest(torch.tensor([m["idx"].shape[1] for m in micro_batches]))
    fill = {"idx": 0, "targets": -100, "reset": False}
    return [
        {name: F.pad(t, (0, longest - t.shape[1]), value=fill[name]) if name in fill else t for name, t in m.items()}
        for m, longest in zip(micro_batches, lengths.tolist())
    ]


def loss_in_chunks(forward: Forward, micro: Micro, chunk: int) -> Tensor:
    """The summed loss of a micro batch, without gradients."""
    total: Tensor | float = 0.0
    state: State = None
    for piece in pieces_of(micro, chunk):
        loss, state = forward(piece, state)
        total = total + loss
    assert isinstance(total, Tensor)  # of one piece at least
    return total


def backward_in_chunks(
    forward: Forward, micro: Micro, chunk: int, truncate: bool, backward: Callable[[Tensor, bool], None]
) -> Tensor:
    """Add the gradients of a micro batch; returns the summed loss.

    `backward(loss, last)` scales a summed loss and takes it backward; `last` marks the final call. truncate cuts the gradient at
    the borders (cheaper: no second pass, no state kept).
    """
    pieces = pieces_of(micro, chunk)
    total: Tensor | float = 0.0
    if truncate:
        state: State = None
        for i, piece in enumerate(pieces):
            loss, end = forward(piece, state)
            state = detach(end)
            backward(loss, i == len(pieces) - 1)
            total += loss.detach()
        assert isinstance(total, Tensor)
        return total

    borders: list[State] = [None]
    with torch.no_grad():
        for piece in pieces[:-1]:
            untrained = {**piece, "targets": torch.full_like(piece["targets"], -100)}  # the head has nothing to do
            borders.append(forward(untrained, borders[-1])[1])
    from_next: list[Tensor | None] = []  # the gradient of the final state, from the chunk behind
    for i in reversed(range(len(pieces))):
        border = borders.pop()
        start = None if border is None else detach(border, requires_grad=True)
        loss, end = forward(pieces[i], start)
        total += loss.detach()
        if from_next:
            loss = loss + GivenGradients.apply(from_next, *tensors_of(end))  # which are scaled already
        backward(loss, i == 0)
        from_next = [] if start is None else [t.grad for t in tensors_of(start)]
    assert isinstance(total, Tensor)
    return total
