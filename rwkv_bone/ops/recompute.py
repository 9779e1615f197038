"""Trade arithmetic for memory: tensors that are cheap to make are made again in the backward pass, not kept for it."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Outputs = Sequence[Tensor]


def recompute_in_backward(
    f: Callable[..., Outputs], *args: Tensor | None, trained: Iterable[Tensor] = ()
) -> contextlib.AbstractContextManager[Outputs]:
    """`with recompute_in_backward(f, *args) as outputs:` gives f(*args), and autograd keeps `args`, not f's inside and outputs.

    What is called within the block may keep the outputs for its own backward, as a projection does its input: it gets them made
    anew there, all at once. `trained`: tensors that f uses beside `args` and that may want a gradient. f must be deterministic,
    and its outputs no views of one another.
    """
    # The compiler decides itself what it keeps and what it makes again.
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return contextlib.nullcontext(f(*args))
    trained = [t for t in trained if t.requires_grad]
    # ZeRO-3 lends a parameter (ds_id) to its module's own forward and backward alone, so f cannot be run again for its gradient
    if any(hasattr(t, "ds_id") for t in trained):
        return contextlib.nullcontext(f(*args))
    return _recompute_in_backward(Recompute(f, args, trained), args)


@contextlib.contextmanager
def _recompute_in_backward(run: "Recompute", args: Sequence[Tensor | None]) -> Iterator[Outputs]:
    outputs = RecomputeFunction.apply(run, *args, *run.trained)
    places = {t.untyped_storage()._cdata: i for i, t in enumerate(outputs)}
    assert len(places) == len(outputs)

    def pack(t: Tensor):
        place = places.get(t.untyped_storage()._cdata)
        if place is None:
            return t
        run.pending += 1
        return place, t.shape, t.stride(), t.storage_offset()

    def unpack(kept):
        if isinstance(kept, Tensor):
            return kept
        place, *view = kept
        t = run.make()[place].detach().as_strided(*view)
        run.pending -= 1
        if run.pending <= 0 and not run.wants_gradient:
            run.outputs = None
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield outputs


class Recompute:
    """f with its arguments, for running it once more in backward. Holds no part of the graph that it is used in."""

    def __init__(self, f: Callable[..., Outputs], args: Sequence[Tensor | None], trained: Sequence[Tensor]):
        self.f, self.trained = f, trained
        self.args = [a if a is None else a.detach().requires_grad_(a.requires_grad) for a in args]
        self.wanted = [a for a in (*self.args, *trained) if a is not None and a.requires_grad]
        self.wants_gradient = bool(self.wanted)
        self.outputs: Outputs | None = None
        self.pending = 0  # tensors that were not kept and are still to be asked for

    def make(self) -> Outputs:
        if self.outputs is None:
            with torch.enable_grad():
                self.outputs = self.f(*self.args)
        return self.outputs


class RecomputeFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run: Recompute, *args):
        ctx.run = run
        return tuple(run.f(*args[: len(run.args)]))

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        run = ctx.run
        outputs, run.outputs = run.make(), None
        # an output that needs no gradient: of `trained`, f may use nothing (a trained time_state is no part of the lerps)
        pairs = [(o, g) for o, g in zip(outputs, gradients) if o.requires_grad]
        if not pairs:
            return None, *(None for _ in (*run.args, *run.trained))
        with torch.enable_grad():
            given = GivenGradients.apply([g for _, g in pairs], *(o for o, _ in pairs))
        found = iter(torch.autograd.grad(given, run.wanted, allow_unused=True))
        return None, *(next(found) if a is not None and a.requires_grad else None for a in (*run.args, *run.trained))


class GivenGradients(torch.autograd.Function):
    """A scalar, 0, whose backward hands each of `tensors` its gradient of `gradients`, which may be None.

    torch.autograd.grad takes gradients too, and imports sympy for them, for half a second.
    """

    @staticmethod
    def forward(ctx, gradients: Sequence[Tensor | None], *tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx, g: Tensor):
        return None, *ctx.gradients


def recomputed(f: Callable[..., Outputs], *args: Tensor | None) -> Outputs:
    """f(*args), of which autograd keeps `args` alone and runs f again in backward, then with all that it keeps.

    Gradients are added to parameters' `.grad`: by `backward()`, and not for `torch.autograd.grad`. Random numbers are the same
    in both runs.
    """
    wanted = torch.zeros((), requires_grad=True)  # parameters of f may train where no argument asks for a gradient
    return checkpoint(lambda _, *a: f(*a), wanted, *args, use_reentrant=True)
