"""Which runs a comparison needs: the methods with equal numbers of trained parameters, the sweep of their rates, the seeds."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..models import LanguageModel
from ..peft import METHODS
from ..peft.adapter import projections
from .comparison import NO_ADAPTER, Comparison, Entry, Run

# -------------------------------------------------- equal numbers of trained parameters


def projection_shapes(model: nn.Module, parts: Iterable[str] | None) -> Counter[tuple[int, int]]:
    """Shapes (out, in) of the projections that get an adapter, and how many have each."""
    shapes = (model.get_parameter(f"{name}.weight").shape for name in projections(model, parts))
    return Counter((out, in_) for out, in_ in shapes)


def trained_parameters(shapes: Mapping[tuple[int, int], int], method: str, options: Mapping[str, Any]) -> int:
    layer = METHODS[method]
    config = layer.config_from(options, method)
    total = 0
    for shape, count in shapes.items():
        try:
            made = layer(torch.empty(shape, device="meta"), config)
        except (RuntimeError, OverflowError):  # torch: sizes that no tensor has
            raise UserError(f"methods: {method} with {dict(options)} is too large") from None
        total += count * sum(p.numel() for p in made.parameters() if p.requires_grad)
    return total


def initial_state_size(model: LanguageModel) -> int:
    shapes = model.shapes(model.sizes, initial_state=True)
    return sum(math.prod(shape) for name, shape in shapes.items() if model.is_initial_state(name))


def match_r(shapes: Mapping[tuple[int, int], int], method: str, options: Mapping[str, Any], budget: int) -> int:
    """The r at which the method trains most nearly `budget` parameters; the smaller of two that are equally near."""
    best, best_distance = 0, math.inf
    for r in range(1, max(max(shape) for shape in shapes) + 1):
        try:
            count = trained_parameters(shapes, method, {**options, "r": r})
        except UserError:  # more than the method can have on these shapes
            if best:
                break
            raise
        if abs(count - budget) < best_distance:
            best, best_distance = r, abs(count - budget)
        if count > 2 * budget:
            break
    return best


def make_entries(comparison: Comparison, model: LanguageModel) -> list[Entry]:
    """The rows of the table, each method with its r."""
    shared = comparison.config()
    train_parts = comparison.flags.get("train_parts", ())
    shapes, whole = projection_shapes(model, shared.parts or None), sum(p.numel() for p in model.parameters())
    if not shapes:
        raise UserError(f"parts: {', '.join(shared.parts) or 'none'} names no projection of the model")
    if unknown := [part for part in train_parts if part not in model.full_parts]:
        raise UserError(f"train_parts: {unknown[0]} is none of {', '.join(model.full_parts)}")
    beside = sum(p.numel() for name, p in model.named_parameters() if any(model.in_part(name, part) for part in train_parts))
    given: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {}
    for label, said in comparison.methods.items():
        options = dict(said)
        method, lrs = options.pop("method", label), tuple(sorted(options.pop("lrs", comparison.lrs)))
        if method not in ("none", "state", *METHODS) or label == "base":
            raise UserError(f"methods: {label} is no method; there are none, state, {', '.join(METHODS)}")
        if method in NO_ADAPTER and options:
            raise UserError(f"methods: {label} puts no adapter on the model and has no option {next(iter(options))}")
        if method == "state" and (reason := model.cannot("state")):
            raise UserError(f"methods: {reason}")
        given[label] = (method, options, lrs)
    budget = comparison.budget
    if isinstance(budget, str) and any(m not in NO_ADAPTER and "r" not in o for m, o, _ in given.values()):
        if budget not in given or given[budget][0] in NO_ADAPTER:
            raise UserError(f"budget: {budget} is no adapter among methods; give one that is, or a number of parameters")
        method, options, _ = given[budget]
        budget = trained_parameters(shapes, method, options)
    entries = []
    for label, (method, options, lrs) in given.items():
        if method not in NO_ADAPTER and "r" not in options:
            assert isinstance(budget, int)
            options = {"r": match_r(shapes, method, options, budget), **options}
        if method == "state":
            trained = initial_state_size(model)
        else:
            trained = whole if method == "none" else trained_parameters(shapes, method, options) + beside
        entries.append(Entry(label, method, tuple(options.items()), lrs, trained))
    return entries


# -------------------------------------------------- what is to be run next


def next_rate(lr: float, up: bool) -> float:
    """The nearest of 1, 3, 10, 30, ... times a power of ten that is clearly above or below `lr`."""
    near = [float(f"{digit}e{power}") for power in range(-45, 46) for digit in (1, 3)]
    return min(x for x in near if x > 1.5 * lr) if up else max(x for x in near if x < lr / 1.5)


def vertex(points: Iterable[tuple[float, float]]) -> float:
    """Where a parabola of the logarithm through three (rate, loss), the middle one lowest, is lowest; to two digits."""
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(lr), loss) for lr, loss in points)
    left, right = (y0 - y1) / (x0 - x1), (y2 - y1) / (x2 - x1)
    if not right > left:  # all three are the same
        return float(f"{math.exp(x1):.1e}")
    x = (x0 + x1) / 2 - left * (x2 - x0) / (2 * (right - left))  # where the slope, which is `left` at the first middle, is 0
    return float(f"{math.exp(x):.1e}")


def sweep(entry: Entry, seed: int, extend: int, refine: int, chosen_by: Mapping[Run, float]) -> tuple[list[Run], float]:
    """The runs of a sweep that are known to be wanted and are not done yet, and the best rate so far.

    chosen_by  run -> loss on the choosing half of the held-out documents, of the runs that are done
    """
    lrs = list(entry.lrs)
    while True:
        runs = {lr: Run(entry, lr, seed) for lr in lrs}
        losses = {lr: chosen_by[run] for lr, run in runs.items() if run in chosen_by}
        missing = [run for lr, run in runs.items() if lr not in losses]
        best = min(losses, key=losses.__getitem__, default=lrs[0])
        if missing:
            return missing, best
        place = lrs.index(best)
        if extend and place == len(lrs) - 1 and math.isfinite(losses[best]):
            lrs.append(next_rate(best, up=True))
            extend -= 1
        elif extend and place == 0:
            lrs.insert(0, next_rate(best, up=False))
            extend -= 1
        elif refine and 0 < place < len(lrs) - 1 and math.isfinite(losses[lrs[place + 1]]):
            found = vertex((lr, losses[lr]) for lr in lrs[place - 1 : place + 2])
            refine -= 1
            if all(abs(math.log(found / lr)) > 0.1 for lr in lrs):  # else it was as good as tried
                lrs = sorted([*lrs, found])
        else:
            return [], best


def to_do(
    entries: Iterable[Entry],
    seeds: tuple[int, ...],
    extend: int,
    refine: int,
    chosen_by: Mapping[Run, float],
    one_rate: float = 0,
) -> list[Run]:
    """All runs that are known to be wanted and are not done: first the sweeps, then one seed after the other."""
    sweeps, repeats = [], []
    for entry in entries:
        if entry.method == "base":
            repeats += [(number, Run(entry, 0.0, seed)) for number, seed in enumerate(seeds)]
            continue
        missing, best = sweep(entry, seeds[0], extend, refine, chosen_by)
        sweeps += missing
        if not missing:
            repeats += [(number, Run(entry, best, seed)) for number, seed in enumerate(seeds)]
        if one_rate and entry.method not in NO_ADAPTER:
            repeats += [(number, Run(entry, one_rate, seed)) for number, seed in enumerate(seeds)]
    ordered = [run for _, run in sorted(repeats, key=lambda item: item[0])]
    return [run for run in dict.fromkeys(sweeps + ordered) if run not in chosen_by]
