"""What every PEFT method is made of: a frozen projection with a trained adapter beside it, put into a model and merged out of it.

A method is one subclass of `AdapterLinear` in a file of its own and one line in `peft/__init__.py`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError

PROJECTIONS = ("att", "ffn")  # the parts adapted by default: every projection of the time and channel mixing


def option(default: Any, help: str) -> Any:
    """A field of a method's Config: its default, whose type is the option's, and what `--help` says of it."""
    return field(default=default, metadata={"help": help})


class QuantisedWeight(nn.Module):
    """A frozen weight in fewer bits, see quant.py. Its bytes are buffers, which casts of a model leave alone."""

    shape: torch.Size
    dtype: torch.dtype  # of `dense()`

    def __init__(self, weight: "Weight", **tensors: Tensor):
        super().__init__()
        self.shape, self.dtype = weight.shape, weight.dtype
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.contiguous().view(torch.uint8))

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device

    def dense(self) -> Tensor:
        """The weight (out, in) that this stands for, in `dtype`; a new tensor."""
        raise NotImplementedError


Weight = Tensor | QuantisedWeight  # of a projection, (out, in)


def weight_of(model: nn.Module, name: str) -> Weight:
    """The weight of the projection of that name."""
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor | QuantisedWeight)
    return weight


class AdapterLinear(nn.Module):
    """A frozen projection (no bias) with an adapter. The base weight (out, in) stays under its key `weight`.

    The adapter is this layer's state dict less the weight. It is trained in float32 whatever the base's dtype is
    (float64 on a float64 base). `forward(x)` equals `x @ merged_weight().T` but for rounding.
    """

    formula: ClassVar[str]  # what the method computes, in one line
    starts_from_gradient: ClassVar[bool] = False  # whether `start` needs the gradient of the loss by the weight

    @dataclass(frozen=True)
    class Config:
        r: int = option(64, "size of the method's square blocks, or rank")

        def __post_init__(self):
            if self.r < 1:
                raise UserError(f"r must be at least 1, not {self.r}")

    def __init__(self, weight: Weight, config: Config):
        super().__init__()
        self.weight: Weight = nn.Parameter(weight.detach(), requires_grad=False) if isinstance(weight, Tensor) else weight
        self.config = config

    @property
    def dtype(self) -> torch.dtype:
        """The adapter's dtype: never less than float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def new(self, *shape: int) -> nn.Parameter:
        """A trainable tensor of zeros on the base weight's device."""
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.weight.device))

    def start(self) -> None:
        """Give the adapter its initial values. Zeros need nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype."""
        return self.project(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], self.weight.shape[0])

    def project(self, x: Tensor) -> Tensor:
        """`forward` of rows: x (n, in) -> (n, out)."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The weight (out, in) of the plain projection that this layer equals, in `self.dtype`, without gradient."""
        raise NotImplementedError

    @classmethod
    def lr_multiplier(cls, name: str, config: Config) -> float:
        """How much faster than the others the adapter tensor `name` learns."""
        return 1.0

    @classmethod
    def config_from(cls, options: Mapping[str, Any], method: str) -> Config:
        """Typed options of a method; one that it does not have is refused by name."""
        known = {f.name: type(f.default) for f in fields(cls.Config)}
        typed: dict[str, Any] = {}
        for name, value in options.items():
            if name not in known:
                raise UserError(f"{method} has no option {name}; it has {', '.join(known)}")
            if known[name] is float and type(value) is int:
                value = float(value)
            if type(value) is not known[name]:
                article = "an" if known[name] is int else "a"
                raise UserError(f"{method}: {name} is {article} {known[name].__name__}, not {value!r}")
            typed[name] = value
        return cls.Config(**typed)

    def extra_repr(self) -> str:
        out, in_ = self.weight.shape
        return f"in={in_}, out={out}, {self.config}"


def dense(weight: Weight) -> Tensor:
    """A base weight as a tensor (out, in): itself, or what a quantised one stands for, made anew at each call."""
    return weight if isinstance(weight, Tensor) else weight.dense()


class FrozenProduct(torch.autograd.Function):
    """plus + x W^T for x (n, in), a frozen weight (out, in), plus (n, out), or None. Keeps the weight alone.

    `plus` is overwritten: the product is accumulated onto it before the one rounding to x's dtype. A small `plus` added to a
    finished product in bf16 would mostly vanish, as whatever is below half a unit in the last place of the sum does.
    """

    @staticmethod
    def forward(ctx, plus: Tensor | None, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        if plus is None:
            return x @ dense(weight).T
        ctx.mark_dirty(plus)
        return plus.addmm_(x, dense(weight).T)

    @staticmethod
    def backward(ctx, g: Tensor):
        wants_plus, wants_x, _ = ctx.needs_input_grad
        return g if wants_plus else None, g @ dense(ctx.weight) if wants_x else None, None


class FrozenLinear(nn.Module):
    """A projection whose weight is frozen and may be a quantised one: what `nn.Linear` cannot hold."""

    def __init__(self, weight: QuantisedWeight):
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)."""
        return FrozenProduct.apply(None, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.weight.shape[0])


def row_panels(rows: int, size: int = 256) -> Iterator[slice]:
    """Slices that cut `rows` rows of a weight into panels of at most `size`: for work that must not copy the whole."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def matches(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name holds one of `parts` (`att`, `ffn.key`, ...) as whole consecutive components."""
    return any(f".{part}." in f".{name}." for part in parts)


def projections(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Names of the projections without an adapter that lie within `parts`; UserError for a part that holds none."""
    linears = [name for name, module in model.named_modules() if type(module) in (nn.Linear, FrozenLinear)]
    parts = list(parts)
    for part in parts:
        if not any(matches(name, [part]) for name in linears):
            pairs = {".".join(name.split(".")[-2:]) for name in linears}
            known = sorted(pairs | {pair.split(".")[0] for pair in pairs})
            raise UserError(f"--parts {part} names no projection of this model; it has {', '.join(known)}")
    return [name for name in linears if matches(name, parts)]


def inject(
    model: nn.Module, method: type[AdapterLinear], config: AdapterLinear.Config, parts: Iterable[str] = PROJECTIONS
) -> list[str]:
    """Freeze the model and put a started adapter on every projection within `parts`; return the projections' names.

    A method that `starts_from_gradient` changes nothing and cannot learn until `start_from_gradients` has started it.
    """
    names = projections(model, parts)
    for layer in attach(model, method, config, names):
        if not method.starts_from_gradient:
            layer.start()
    return names


def attach(
    model: nn.Module, method: type[AdapterLinear], config: AdapterLinear.Config, names: Iterable[str]
) -> list[AdapterLinear]:
    """Freeze the model and replace the named projections by adapter layers, not started: for values from a file."""
    model.requires_grad_(False)
    layers = []
    for name in names:
        layers.append(method(weight_of(model, name), config))
        model.set_submodule(name, layers[-1])
    return layers


TRAIN_PARTS = {
    "emb": lambda name: name == "emb.weight",
    "head": lambda name: name == "head.weight",
    "time": lambda name: name.rpartition(".")[2].startswith("time_"),
    "ln": lambda name: any(component.startswith("ln") for component in name.split(".")),
}


def train_parts(model: nn.Module, parts: Iterable[str]) -> list[str]:
    """Let parts of the base train in full beside the adapter: emb, head, time, ln. Returns their names."""
    names = []
    for part in parts:
        if part not in TRAIN_PARTS:
            raise UserError(f"--train_parts {part}: unknown; it takes {', '.join(TRAIN_PARTS)}")
        names += [name for name, _ in model.named_parameters() if TRAIN_PARTS[part](name)]
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return names


def adapters(model: nn.Module) -> dict[str, AdapterLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, AdapterLinear)}


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Replace every adapter by a plain projection of its merged weight, rounded once to the base's dtype."""
    for name, layer in adapters(model).items():
        weight = layer.merged_weight().to(layer.weight.dtype)
        out, in_ = weight.shape
        linear = nn.Linear(in_, out, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        model.set_submodule(name, linear)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file needs beside the base: the adapters' tensors and all else that is trained, by their full names."""
    of_adapters = {
        f"{name}.{key}": tensor
        for name, layer in adapters(model).items()
        for key, tensor in layer.state_dict().items()
        if key.partition(".")[0] != "weight"
    }
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**of_adapters, **{name: p for name, p in trained.items() if name not in of_adapters}}


def ceil_div(a: int, b: int) -> int:
    return math.ceil(a / b)
