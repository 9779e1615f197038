"""Base + adapters -> the tensors of one model, one by one.

Each tensor is read, changed in float32, rounded once to its dtype and handed on before the next one is read, so that memory is
bounded by the largest tensor. Several adapters are applied in order, each to the merge of those before it, on which it must have
been trained: the result is bit for bit that of merging one by one.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from ..files.adapters import Adapter
from ..files.models import by_parameter, combine, file_tensors, fingerprint, open_model, sample
from ..files.pth import Layout, Streamed
from ..interop.rwkv_peft import UNAIDED, Foreign
from ..ops import rounding
from ..peft import quant
from ..peft.adapter import matches

PIECE = 1 << 16  # entries looked at together where effects are summed up: they stay in the cache


@dataclass
class Effect:
    """What an adapter did to a part of the model: squares summed over the entries, and counts of them."""

    tensors: int = 0
    weight: float = 0.0
    update: float = 0.0
    lost: float = 0.0  # of the difference between the rounded tensor and the exact one
    moved: int = 0  # entries with an update that is not 0
    vanished: int = 0  # those of them that are unchanged after rounding

    def round(self, before: Tensor, exact: Iterable[tuple[slice, Tensor]], rounded: Tensor) -> None:
        """Round `exact`, given as panels of rows, into `rounded`, and add the change from `before`, which has its shape."""
        spare = before.new_empty(0)  # fresh memory costs more than what is done in it
        by_kernel = rounding.fits(before, rounded)
        for rows, panel in exact:
            if by_kernel and panel.dtype == torch.float32:
                self.add(rounding.effect(before[rows], panel, rounded[rows]))
                continue
            compute = functools.reduce(torch.promote_types, (before.dtype, panel.dtype, torch.float32))
            size = min(PIECE, panel.numel())
            if spare.dtype != compute or spare.numel() < 3 * size:
                spare = before.new_empty(3, size, dtype=compute)
            for piece in zip(*(t.reshape(-1).split(PIECE) for t in (before[rows], panel, rounded[rows]))):
                self.round_piece(*piece, *spare[:, : len(piece[0])])

    def round_piece(self, before: Tensor, exact: Tensor, rounded: Tensor, b: Tensor, r: Tensor, spare: Tensor) -> None:
        """`round` for entries that stay in the cache; b, r, spare: memory for so many, in the dtype to compute in."""
        b.copy_(before)
        r.copy_(rounded.copy_(exact))
        self.weight += square(b)
        self.update += square(torch.sub(exact, b, out=spare))
        moved = ones(spare.ne_(0))
        self.moved += moved
        # without an update nothing changes, so that what changed in the file is among what has one
        same = before.dtype == rounded.dtype
        self.vanished += moved - ones(torch.ne(r, b if same else b.copy_(before.to(rounded.dtype)), out=spare))
        self.lost += square(r.sub_(exact))

    def add(self, sums: rounding.Sums) -> None:
        for name, value in sums._asdict().items():
            setattr(self, name, getattr(self, name) + value)

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __str__(self) -> str:
        size = "new" if self.update and not self.weight else f"{ratio(self.update, self.weight):.3%}"  # an initial state
        return (
            f"{self.tensors:7} {size:>12} {ratio(self.lost, self.update):12.3%} "
            f"{self.vanished / max(self.moved, 1):12.3%}"
        )


def square(x: Tensor) -> float:
    """The sum of the squares of a tensor in the cache."""
    x = x.reshape(-1)
    total = torch.dot(x, x).item()
    return total if math.isfinite(total) and total > 1e-30 else torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def ones(x: Tensor) -> int:
    """How many entries of a tensor of zeros and ones are 1: exact up to `PIECE` of them, and faster than count_nonzero."""
    return int(torch.dot(x, x))


def ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


@dataclass(frozen=True)
class Options:
    foreign: Foreign = UNAIDED
    dtype: torch.dtype | None = None  # to write; None: each tensor's own
    device: str = "cpu"
    force: bool = False
    quant: str = "none"  # merge onto what training with that --quant saw


class Merge:
    """A base and its adapters, opened and checked; `tensors()` does the work as it is drawn upon.

    Tensors are known by the model's names of its parameters; the layout has the names of the base's file.
    """

    def __init__(self, base: Path, adapters: list[Path], options: Options = Options()):
        self.base_path, self.options = base, options
        self.kind, self.sizes, tensors, self.folder = open_model(base)
        with torch.device("meta"):
            self.model = self.kind(self.sizes)  # holds no values: for what a model says of itself
        self.model.fingerprint = fingerprint(tensors)
        self.dtype = next(iter(tensors.values())).dtype
        self.adapters = [Adapter(path, self.kind, self.sizes, options.foreign) for path in adapters]
        self.effects: list[dict[str, Effect]] = [{} for _ in adapters]  # of each adapter, by part
        self.buffers = [torch.empty(0, dtype=torch.uint8) for _ in adapters]
        self.check_bases()
        self.layout = self.make_layout(tensors)
        copies = self.kind.copies(self.sizes)
        self.parameter = {name: copies.get(name) or self.kind.parameter_name(name) for name in self.layout}
        del tensors
        self.base = Streamed(lambda: by_parameter(self.kind, self.sizes, file_tensors(base)))

    @property
    def size(self) -> int:
        """Bytes of the merged model."""
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.layout.values())

    @property
    def initial_state(self) -> bool:
        """Whether the merged model has a trained initial state."""
        return any(map(self.kind.is_initial_state, self.parameter.values()))

    def check_bases(self) -> None:
        """What can be known before the work: the first adapter's base is this one, the others' is not."""
        if self.options.force:
            return
        for adapter in self.adapters[:1]:
            adapter.check_base(self.model.fingerprint)
        for adapter in self.adapters[1:]:
            if adapter.info["base"].get("fingerprint") == self.model.fingerprint:
                raise UserError(
                    f"{adapter.path}: was trained on the base itself, not on its merge with {self.adapters[0].path}, where it "
                    f"would not do what it was trained to do; --force merges it all the same"
                )

    def make_layout(self, tensors: Mapping[str, Tensor]) -> Layout:
        """The base's tensors in its order, with an initial state for each layer, at its place, if an adapter brings one."""
        dtype = self.options.dtype
        layout = {name: (dtype or t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        if any(adapter.initial_state for adapter in self.adapters):
            theirs = {self.kind.parameter_name(name): name for name in layout}
            order, last = list(layout), -1
            for name, shape in self.kind.shapes(self.sizes, initial_state=True).items():
                if name in theirs:
                    last = order.index(theirs[name])
                else:
                    last += 1
                    order.insert(last, name)
                    layout[name] = (dtype or self.dtype, shape)
            layout = {name: layout[name] for name in order}
        return layout

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name in the file, merged tensor), in the layout's order and dtypes. A large one is valid until the next is drawn."""
        met: list[list[str]] = [[] for _ in self.adapters]  # samples of the model that each adapter meets
        for name, (dtype, shape) in self.layout.items():
            parameter = self.parameter[name]
            tensor = self.start(parameter, shape)
            there = parameter in self.base
            own = tensor.dtype
            for i, adapter in enumerate(self.adapters):
                if there and i:
                    met[i].append(sample(name, tensor))
                if adapter.changes(parameter):
                    tensor = self.changed(i, parameter, tensor, dtype if i == len(self.adapters) - 1 else own)
                    there = True
            yield name, tensor if tensor.dtype == dtype else converted(tensor, dtype, name, self.base_path)
        for adapter, samples in zip(self.adapters[1:], met[1:]):
            adapter.check_base(combine(samples), self.options.force)

    def start(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The base's tensor as training saw it: zeros for an initial state; a projection quantised there, dense again."""
        if name not in self.base:
            return torch.zeros(shape, dtype=self.dtype)
        tensor = self.base[name]
        layer, _, last = name.rpartition(".")
        if self.options.quant == "none" or not (last == "weight" and matches(layer, self.kind.targets) and tensor.dim() == 2):
            return tensor
        return quant.quantise(tensor.to(self.options.device), self.options.quant).dense().cpu()

    def before(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor that the last adapter meets."""
        tensor = self.start(name, shape)
        for adapter in self.adapters[:-1]:
            if adapter.changes(name):
                tensor = adapter.merged(name, tensor.to(self.options.device)).to(tensor.dtype).cpu()
        return tensor

    def changed(self, i: int, name: str, before: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor after adapter i, rounded to `dtype`, on the CPU."""
        before = before.to(self.options.device)
        after = self.memory(i, before.shape, dtype)
        effect = self.effects[i].setdefault(self.model.part_of(name), Effect())
        effect.tensors += 1
        effect.round(before, self.adapters[i].merged_panels(name, before), after)
        if not math.isfinite(effect.lost):  # a sum over the tensor in which infinity and NaN are seen
            converted(self.adapters[i].merged(name, before), dtype, name, self.adapters[i].path)
        return after.cpu()

    def memory(self, i: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Memory for a tensor after adapter i: for large ones always the same, as fresh memory costs as much as the work."""
        if shape.numel() < rounding.LARGE:
            return torch.empty(shape, dtype=dtype, device=self.options.device)
        size = shape.numel() * dtype.itemsize
        if self.buffers[i].numel() < size:
            self.buffers[i] = torch.empty(size, dtype=torch.uint8, device=self.options.device)
        return self.buffers[i][:size].view(dtype).view(shape)

    def report(self) -> str:
        """What each adapter did, by part."""
        lines = []
        for adapter, effects in zip(self.adapters, self.effects):
            total = sum(effects.values(), Effect())
            lines.append(f"changed    {total.tensors} of {len(self.layout)} tensors by {adapter.path}")
            lines.append(f"           {'part':16} tensors       update         lost    unchanged")
            lines += [f"           {part:16} {effect}" for part, effect in effects.items()]
            lines.append(f"           {'all':16} {total}")
        if lines:
            lines.append("           update: its size, relative to the weight's; lost: size of the rounding error, relative to")
            lines.append("           the update's; unchanged: share of the entries with an update that rounding left unchanged")
        for adapter, effects in zip(self.adapters, self.effects):
            total = sum(effects.values(), Effect())
            if total.lost > total.update / 4:  # of squares: half of the size
                share = ratio(total.lost, total.update)
                lines.append(f"note       rounding took {share:.0%} of {adapter.path}'s update; --dtype fp32 keeps it")
        return "\n".join(lines)


def converted(tensor: Tensor, dtype: torch.dtype, name: str, source: Path) -> Tensor:
    """The tensor in the dtype to write; UserError if it does not survive that."""
    result = tensor.to(dtype)
    if not finite(result):
        if finite(tensor):
            raise UserError(f"{source}: {name} reaches {tensor.abs().max():.4g}, beyond {dtype}; use --dtype bf16 or fp32")
        raise UserError(f"{source}: {name} holds NaN or infinity; the training diverged")
    return result


def finite(tensor: Tensor) -> bool:
    return all(x.isfinite() for x in tensor.aminmax())
