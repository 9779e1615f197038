"""What every PEFT method is made of: a frozen projection with a trained adapter beside it, put into a model and merged out of it.

A method is one subclass of `AdapterLinear` in a file of its own and one line in `peft/__init__.py`.
"""

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import UserError


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


def weight_and_bias(model: nn.Module, name: str) -> tuple[Weight, Tensor | None]:
    """The weight and the bias, if there is one, of the linear layer of that name."""
    layer = model.get_submodule(name)
    assert isinstance(layer.weight, Tensor | QuantisedWeight)
    return layer.weight, getattr(layer, "bias", None)


class AdapterLinear(nn.Module):
    """A frozen linear layer with an adapter. Base weight (out, in) and bias (out,) stay under their keys `weight` and `bias`.

    The adapter is this layer's state dict less these two. It is trained in float32 whatever the base's dtype is (float64 on a
    float64 base). `forward(x)` equals `x @ merged_weight().T + bias` but for rounding. Under `torch.autocast` it computes in the
    autocast dtype, as `nn.Linear` does.
    """

    bias: nn.Parameter | None
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
        self.register_parameter("bias", None)
        self.config = config
        self.disabled = False

    @classmethod
    def on(cls, weight: Weight, config: Config, bias: Tensor | None = None) -> "AdapterLinear":
        """The layer, not started, in place of a linear layer of that weight and bias."""
        layer = cls(weight, config)
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
        return layer

    @property
    def dtype(self) -> torch.dtype:
        """The adapter's dtype: never less than float32."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def new(self, *shape: int) -> nn.Parameter:
        """A trainable tensor of zeros on the base weight's device."""
        return nn.Parameter(torch.zeros(shape, dtype=self.dtype, device=self.weight.device))

    def start(self) -> None:
        """Give the adapter its initial values. Zeros need nothing."""

    @staticmethod
    def kernels(device: str, dtype: torch.dtype) -> str:
        """What computes the method on that kind of device beside torch's products, in words; "" for nothing."""
        return ""

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype (under autocast: in its)."""
        device = x.device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
            with torch.autocast(device, enabled=False):
                return self.forward(x)
        rows = x.reshape(-1, x.shape[-1])
        y = FrozenProduct.apply(None, rows, self.weight) if self.disabled else self.project(rows)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.weight.shape[0])

    def project(self, x: Tensor) -> Tensor:
        """`forward` of rows without the bias: x (n, in) -> (n, out)."""
        raise NotImplementedError

    def merged_weight(self) -> Tensor:
        """The weight (out, in) of the plain projection that this layer equals, in `self.dtype`, without gradient."""
        raise NotImplementedError

    def merged_panels(self) -> Iterator[tuple[slice, Tensor]]:
        """`merged_weight` as panels (rows, their values), from the top down; a panel is valid until the next one is drawn."""
        yield slice(None), self.merged_weight()

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


def dense(weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
    """A base weight as a tensor (out, in) of `dtype` or its own: itself, or what a quantised one stands for, made anew."""
    w = weight if isinstance(weight, Tensor) else weight.dense()
    return w if dtype is None or w.dtype == dtype else w.to(dtype)


class FrozenProduct(torch.autograd.Function):
    """plus + x W^T for x (n, in), a frozen weight (out, in), plus (n, out), or None. Keeps the weight alone.

    `plus` is overwritten: the product is accumulated onto it before the one rounding to x's dtype. A small `plus` added to a
    finished product in bf16 would mostly vanish, as whatever is below half a unit in the last place of the sum does.
    """

    @staticmethod
    def forward(ctx, plus: Tensor | None, x: Tensor, weight: Weight) -> Tensor:
        ctx.weight = weight
        if plus is None:
            return x @ dense(weight, x.dtype).T
        ctx.mark_dirty(plus)
        return plus.addmm_(x, dense(weight, x.dtype).T)

    @staticmethod
    def backward(ctx, g: Tensor):
        wants_plus, wants_x, _ = ctx.needs_input_grad
        return g if wants_plus else None, g @ dense(ctx.weight, g.dtype) if wants_x else None, None


class FrozenLinear(nn.Module):
    """A linear layer whose weight is frozen and may be a quantised one: what `nn.Linear` cannot hold."""

    def __init__(self, weight: QuantisedWeight, bias: Tensor | None = None):
        super().__init__()
        self.weight = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out), in x's dtype (under autocast: in its)."""
        y = FrozenProduct.apply(None, x.reshape(-1, x.shape[-1]), self.weight)
        return (y if self.bias is None else y + self.bias.to(y.dtype)).view(*x.shape[:-1], self.weight.shape[0])


def row_panels(rows: int, size: int = 256) -> Iterator[slice]:
    """Slices that cut `rows` rows of a weight into panels of at most `size`: for work that must not copy the whole."""
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size))


def matches(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name holds one of `parts` (`att`, `ffn.key`, ...) as whole consecutive components."""
    return any(f".{part}." in f".{name}." for part in parts)


def projections(model: nn.Module, parts: Iterable[str] | None = None) -> list[str]:
    """Names of the linear layers without an adapter that lie within `parts`; UserError for a part that holds none.

    parts: components of names (`att`, `ffn.key`, `q_proj`); None: those that the model names as its `targets`, else all.
    """
    linears = [name for name, module in model.named_modules() if type(module) in (nn.Linear, FrozenLinear)]
    parts = getattr(model, "targets", None) if parts is None else list(parts)
    if parts is None:
        return linears
    for part in parts:
        if not any(matches(name, [part]) for name in linears):
            pairs = {".".join(name.split(".")[-2:]) for name in linears}
            known = sorted(pairs | {pair.split(".")[0] for pair in pairs})
            raise UserError(f"{part} names no linear layer of this model; there are {', '.join(known)}")
    return [name for name in linears if matches(name, parts)]


def inject(
    model: nn.Module,
    method: type[AdapterLinear],
    config: AdapterLinear.Config,
    parts: Iterable[str] | None = None,
    start: bool = True,
) -> list[str]:
    """Freeze the model and put a started adapter on every linear layer within `parts` (see `projections`); return their names.

    start=False leaves zeros, for values that come from elsewhere. A method that `starts_from_gradient` changes nothing and cannot
    learn until `start_from_gradients` has started it.
    """
    names = projections(model, parts)
    for layer in attach(model, method, config, names):
        if start and not method.starts_from_gradient:
            layer.start()
    return names


def attach(
    model: nn.Module, method: type[AdapterLinear], config: AdapterLinear.Config, names: Iterable[str]
) -> list[AdapterLinear]:
    """Freeze the model and replace the named layers by adapter layers, not started: for values from a file.

    UserError, and no layer is replaced, where the method cannot have a layer's shape.
    """
    model.requires_grad_(False)
    layers = {}
    for name in names:
        weight, bias = weight_and_bias(model, name)
        try:
            layers[name] = method.on(weight, config, bias)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return list(layers.values())


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within it the model computes what the base does: adapters do nothing.

    ValueError where parts of the base are trained in full beside the adapters: the base's values are not kept.
    """
    layers = adapters(model)
    own = {id(p) for layer in layers.values() for p in layer.parameters()}
    if other := [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in own]:
        raise ValueError(f"the base's own output is not to be had: {other[0]} is trained in full beside the adapters")
    for layer in layers.values():
        layer.disabled = True
    try:
        yield
    finally:
        for layer in layers.values():
            layer.disabled = False


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
        linear.bias = layer.bias  # type: ignore[assignment]  # None is what nn.Linear has without one
        model.set_submodule(name, linear)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What a file needs beside the base: the adapters' tensors and all else that is trained, by their full names."""
    of_adapters = {
        f"{name}.{key}": tensor
        for name, layer in adapters(model).items()
        for key, tensor in layer.state_dict().items()
        if key.partition(".")[0] not in ("weight", "bias")
    }
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return {**of_adapters, **{name: p for name, p in trained.items() if name not in of_adapters}}


def ceil_div(a: int, b: int) -> int:
    return math.ceil(a / b)
