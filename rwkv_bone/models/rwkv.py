"""What the versions of RWKV have in common: blocks between an embedding and a head, token shift, the parts of their files."""

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..ops.recompute import recomputed
from ..ops.recurrence import Recurrence
from .base import USUAL, Execution, GGUFTensor, LanguageModel, Sizes
from .direct import direct

GGUF_OUTSIDE = {"emb": "token_embd", "blocks.0.ln0": "token_embd_norm", "ln_out": "output_norm", "head": "output"}


class LayerState(NamedTuple):
    """What one block remembers: the last inputs of its two mixers, and the WKV state."""

    att_shift: Tensor  # (B, C)
    wkv: Tensor  # (B, H, N, N), at least float32
    ffn_shift: Tensor  # (B, C)


@dataclass(frozen=True)
class RWKVSizes(Sizes):
    """C = n_embd, A = dim_att = H N (H heads of N channels), F = dim_ffn, V = vocab_size."""

    dim_att: int
    dim_ffn: int
    head_size: int

    @property
    def n_head(self) -> int:
        return self.dim_att // self.head_size


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype), which takes as long as a small addition even where there is nothing to do."""
    return x if x.dtype == dtype else x.to(dtype)


def shift_difference(x: Tensor, last: Tensor | None, reset: Tensor | None) -> Tensor:
    """x one step earlier, less x. `last` (B, C), or zeros, comes first; zeros where `reset` (B, T) marks a document's start."""
    first = torch.zeros_like(x[:, :1]) if last is None else cast(last, x.dtype).unsqueeze(1)
    previous = torch.cat([first, x[:, :-1]], 1) if x.shape[1] > 1 else first
    if reset is not None:
        previous = previous.masked_fill(reset.unsqueeze(-1), 0)
    return previous - x if previous is first else previous.sub_(x)  # not in place: `first` is the state's


class SquaredRelu(torch.autograd.Function):
    """relu(x)^2 with one temporary of x's size in each direction, where autograd's own takes three."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.relu(x).square_()

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.relu(x).mul_(2).mul_(g)


def squared_relu(x: Tensor) -> tuple[Tensor]:
    return (SquaredRelu.apply(x) if torch.is_grad_enabled() else torch.relu(x).square_(),)


def linear(in_features: int, out_features: int) -> nn.Linear:
    return nn.Linear(in_features, out_features, bias=False)


def orthogonal(shape: tuple[int, ...], gain: float, generator: torch.Generator | None) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), gain, generator=generator)


class Block(nn.Module):
    """One layer: `att`, then `ffn`, each on its input's norm and added to it; layer 0 norms the embeddings first."""

    def __init__(self, sizes: RWKVSizes, layer: int, TimeMix: Callable[..., nn.Module], ChannelMix: Callable[..., nn.Module]):
        super().__init__()
        self.ln1 = nn.LayerNorm(sizes.n_embd)
        self.ln2 = nn.LayerNorm(sizes.n_embd)
        self.first = layer == 0
        if self.first:
            self.ln0 = nn.LayerNorm(sizes.n_embd)
        self.att = TimeMix(sizes, layer)
        self.ffn = ChannelMix(sizes)

    def forward(
        self, x: Tensor, carry: Tensor | None, state: LayerState | None, reset: Tensor | None = None, op: str = "auto"
    ) -> tuple[Tensor, Tensor | None, LayerState]:
        """x (B, T, C) -> the same, the next `carry`, the new state."""
        if self.first:
            x = self.ln0(x)
        shift, wkv, ffn_shift = state or (None, None, None)
        delta, carry, shift, wkv = self.att(self.ln1(x), carry, shift, wkv, reset, op)
        x = x + delta
        delta, ffn_shift = self.ffn(self.ln2(x), ffn_shift, reset)
        return x + delta, carry, LayerState(shift, wkv, ffn_shift)


def recomputed_block(block: Callable, x: Tensor, carry: Tensor | None, state: LayerState | None):
    """A block of which autograd keeps the inputs alone."""

    def flat(x: Tensor, carry: Tensor | None, *state: Tensor) -> tuple[Tensor, ...]:
        x, carry, new = block(x, carry, LayerState(*state) if state else None)
        return (x, *new) if carry is None else (x, *new, carry)

    x, *new = recomputed(flat, x, carry, *(state or ()))
    return x, new[3] if len(new) > 3 else None, LayerState(*new[:3])


class RWKV(LanguageModel):
    """Blocks between `emb` and `head`. A version gives `Sizes`, its mixings, `recurrence` and the names of its parameters.

    `Sizes` says by `time_state` whether the file has a trained initial state, and `block.att.add_initial_state()` makes one.

    `TimeMix(sizes, layer)` maps x (B, T, C), carry, shift (B, C), wkv (B, H, N, N), reset, op to the output (B, T, C), carry,
    shift, wkv; `carry` is what a layer hands to the next ones beside x, None at first. `ChannelMix(sizes)` maps x, shift, reset
    to the output and shift.
    """

    Sizes: ClassVar[type[RWKVSizes]]
    TimeMix: ClassVar[type[nn.Module]]
    ChannelMix: ClassVar[type[nn.Module]]
    recurrence: ClassVar[Recurrence]
    targets = ("att", "ffn")
    full_parts = ("emb", "head", "time", "ln")
    runs_on_meta = True
    capabilities = frozenset({"infctx", "state", "pack", "op"})
    gguf_names: ClassVar[Mapping[str, str]]  # within a block, without .weight and .bias: here -> llama.cpp's
    gguf_lerps: ClassVar[tuple[str, ...]]  # within a block: the vectors that it reads as one tensor, in this order
    state_rate: ClassVar[float]  # recommended for state tuning: heads are alike at every width

    def __init__(self, sizes: RWKVSizes, execution: Execution = USUAL):
        super().__init__(sizes, execution)
        # not filled: a normal distribution on the meta device would import half of torch, for seconds
        self.emb = nn.Embedding.from_pretrained(torch.empty(sizes.vocab_size, sizes.n_embd), freeze=False)
        self.blocks = nn.ModuleList(Block(sizes, n, self.TimeMix, self.ChannelMix) for n in range(sizes.n_layer))
        self.ln_out = nn.LayerNorm(sizes.n_embd)
        self.head = linear(sizes.n_embd, sizes.vocab_size)

    def cannot(self, feature: str) -> str:
        if feature == "pack" and self.sizes.time_state:
            return "documents in one row cannot each begin with the model's trained initial state"
        return super().cannot(feature)

    # ------------------------------------------------ computing

    def hidden(self, idx: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, list[LayerState]]:
        x, carry = self.emb(idx), None
        new_state = []
        for layer, block in enumerate(self.blocks):
            run = partial(block, reset=reset, op=self.execution.op)
            if self.execution.grad_cp and torch.is_grad_enabled():
                run = partial(recomputed_block, run)
            x, carry, layer_state = run(x, carry, state[layer] if state is not None else None)
            new_state.append(layer_state)
        return self.ln_out(x), new_state

    def stages(self) -> Iterator[tuple[str, nn.Module, Callable[[Any], Any]]]:
        yield "emb.", self.emb, lambda idx: (self.emb(idx), None)
        for layer in range(len(self.blocks)):
            yield f"blocks.{layer}.", self.blocks[layer], partial(self._stage, layer)
        yield "ln_out.", self.ln_out, lambda passed: self.ln_out(passed[0])
        yield "head.", self.head, lambda x: self.head(x)

    def _stage(self, layer: int, passed: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
        return self.blocks[layer](*passed, None, op=self.execution.op)[:2]

    def shortened(self, layers: int) -> "RWKV":
        short = copy.copy(self)
        short._modules = {**self._modules, "blocks": self.blocks[:layers]}
        return short

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> "RWKV":
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        places = self.state_dict()
        for name, tensor in self.initial_values(self.sizes, generator):
            places[name].copy_(tensor)
        return self

    @classmethod
    def initial_values(cls, sizes: Any, generator: torch.Generator | None = None) -> Iterator[tuple[str, Tensor]]:
        """RWKV-LM's initial value of each parameter of a new model (generate_init_weight in its model.py)."""
        for key, shape in cls.shapes(sizes).items():
            _, layer, name = key.split(".", 2) if key.startswith("blocks.") else ("", 0, key)
            match name:
                case "emb.weight":
                    value = torch.empty(shape).uniform_(-1e-4, 1e-4, generator=generator)
                case "head.weight":
                    value = orthogonal(shape, 0.5 * max(1.0, math.sqrt(sizes.vocab_size / sizes.n_embd)), generator)
                case "att.ln_x.weight":
                    value = torch.full(shape, ((1 + int(layer)) / sizes.n_layer) ** 0.7)
                case _ if cls.in_part(name, "ln"):
                    value = torch.zeros(shape) if name.endswith(".bias") else torch.ones(shape)
                case _:
                    value = cls.initial_value(name, shape, int(layer), sizes, generator)
            yield key, value.view(shape)

    @classmethod
    def initial_value(
        cls, name: str, shape: tuple[int, ...], layer: int, sizes: Any, generator: torch.Generator | None
    ) -> Tensor:
        """That of a parameter of the mixings, by its name within a block; of any shape with as many entries."""
        raise NotImplementedError

    def for_sampling(self) -> LanguageModel:
        return direct(self)

    # ------------------------------------------------ what parameters are

    @classmethod
    def in_part(cls, name: str, part: str) -> bool:
        match part:
            case "emb" | "head":
                return name == f"{part}.weight"
            case "ln":
                return any(component.startswith("ln") for component in name.split("."))
            case "time":
                return cls.is_time(name)
        return False

    @classmethod
    def is_time(cls, name: str) -> bool:
        """Whether a parameter belongs to the mixing over time and is neither a projection nor a norm."""
        raise NotImplementedError

    def recommended_rate(self, method: str) -> float:
        return self.state_rate if method == "state" else super().recommended_rate(method)

    # ------------------------------------------------ state tuning

    @classmethod
    def is_initial_state(cls, name: str) -> bool:
        return name.endswith(".att.time_state")

    def add_initial_state(self) -> list[str]:
        if not self.sizes.time_state:
            self.sizes = replace(self.sizes, time_state=True)
            for block in self.blocks:
                att: Any = block.att
                att.add_initial_state()
        return [f"blocks.{layer}.att.time_state" for layer in range(self.sizes.n_layer)]

    # ------------------------------------------------ for people

    def describe(self) -> str:
        s = self.sizes
        return (
            f"{self.title}, {s.n_layer} layers, n_embd {s.n_embd}, dim_att {s.dim_att}, {s.n_head} heads of {s.head_size}, "
            f"dim_ffn {s.dim_ffn}, vocabulary {s.vocab_size}"
        )

    def kernels(self, device: str, dtype: torch.dtype) -> str:
        op = self.recurrence
        return f"{op.name.upper()}: {op.describe(device, dtype, self.sizes.head_size, self.execution.op)}"

    def cuda_extra_bytes(self, B: int, T: int) -> int:
        r = torch.empty(B, T, self.sizes.n_head, self.sizes.head_size, dtype=self.dtype, device="meta")
        saved = {device: math.prod(kernels.saved_shape(r)) for device, kernels in self.recurrence.kernels.items()}
        return 4 * (saved["cuda"] - saved["cpu"])

    # ------------------------------------------------ files

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        return version_of(tensors) == cls.version

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], source: str) -> Any:
        layers = {int(m[1]) for key in tensors if (m := re.match(r"blocks\.(\d+)\.", key))}
        try:
            sizes = cls.read_sizes(tensors, len(layers))
        except KeyError as error:
            raise UserError(f"{source}: an {cls.title} model without {error.args[0]}; the file is damaged or cut") from None
        except ValueError:
            raise UserError(f"{source}: tensors of the wrong rank for an {cls.title} model; the file is damaged") from None
        if sizes.dim_att % sizes.head_size:
            raise UserError(f"{source}: head size {sizes.head_size} does not divide {sizes.dim_att}; the file is damaged")
        cls.check(sizes, tensors, source)
        return sizes

    @classmethod
    def gguf_metadata(cls, sizes: Any, source: str) -> dict[str, int | float]:
        if sizes.dim_att != sizes.n_embd:
            raise UserError(f"{source}: dim_att {sizes.dim_att} is not n_embd, {sizes.n_embd}, and llama.cpp knows no such model")
        return {
            "context_length": 1 << 20,  # there is no limit
            "embedding_length": sizes.n_embd,
            "block_count": sizes.n_layer,
            "feed_forward_length": sizes.dim_ffn,
            "attention.layer_norm_epsilon": 1e-5,
            "attention.head_count": 0,  # demanded and not used
            "wkv.head_size": sizes.head_size,
        }

    @classmethod
    def gguf_tensors(cls, sizes: Any) -> Iterator[GGUFTensor]:
        for name in cls.shapes(sizes):
            stem, kind = name.rpartition(".")[::2] if name.endswith((".weight", ".bias")) else (name, "weight")
            if stem in GGUF_OUTSIDE:
                yield GGUFTensor(f"{GGUF_OUTSIDE[stem]}.{kind}", (name,), torch.squeeze)
                continue
            _, layer, inner = stem.split(".", 2)
            if inner == cls.gguf_lerps[0]:
                parts = tuple(f"blocks.{layer}.{lerp}" for lerp in cls.gguf_lerps)
                yield GGUFTensor(f"blk.{layer}.time_mix_lerp_fused.weight", parts, lambda *parts: torch.stack(parts))
            elif inner not in cls.gguf_lerps:
                yield GGUFTensor(f"blk.{layer}.{cls.gguf_names[inner]}.{kind}", (name,), cls.gguf_change(inner, int(layer)))

    @classmethod
    def gguf_change(cls, inner: str, layer: int) -> Callable[[Tensor], Tensor]:
        """What llama.cpp does to the tensor of that name within that block."""
        raise NotImplementedError

    @classmethod
    def read_sizes(cls, tensors: Mapping[str, Tensor], n_layer: int) -> RWKVSizes:
        """Sizes from shapes; KeyError for a missing tensor, ValueError for one of the wrong rank."""
        raise NotImplementedError

    @classmethod
    def new_sizes(cls, **given: int) -> Any:
        known = {f.name for f in fields(cls.Sizes)}
        given = {"head_size": 64, **{name: size for name, size in given.items() if name in known}}
        for name in ("vocab_size", "n_layer", "n_embd", "head_size"):
            if given.get(name, 0) < 1:
                raise UserError(f"a new model needs --{name} of at least 1, not {given.get(name, 0)}")
        sizes = cls.default_sizes(given)
        if sizes.dim_ffn < 1:
            raise UserError(f"--n_embd {sizes.n_embd} is too small for a default channel-mix size; give --dim_ffn")
        if sizes.dim_att % sizes.head_size:
            raise UserError(f"head size {sizes.head_size} does not divide dim_att {sizes.dim_att}; give another --head_size_a")
        return sizes

    @classmethod
    def default_sizes(cls, given: Mapping[str, int]) -> RWKVSizes:
        """Sizes with the version's defaults for what is not given, or 0."""
        raise NotImplementedError


def version_of(tensors: Mapping[str, Tensor]) -> str:
    """The RWKV version that a state dict's names tell ("x040" to "x070"), or "" if they are no RWKV's."""
    att = {key.split(".att.", 1)[1] for key in tensors if re.match(r"blocks\.\d+\.att\.", key)}
    if "r_k" in att:
        return "x070"
    if "time_maa_x" in att or "time_maa_w1" in att:
        return "x060"
    if "time_decay" in att:
        return "x050" if any(name.startswith("ln_x") for name in att) else "x040"
    return ""
