"""The seam between a language model and the rest of the program: all that the others may know of a model is stated here.

A model is one file of this folder: a subclass of `LanguageModel`, a frozen dataclass of its sizes, one line in the registry
(`models/__init__.py`). No other room names a version, a parameter or a block.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import UserError

State = Any  # a tree (lists, tuples, dicts) of tensors whose first dimension is the batch

# ---------------------------------------------------------------- states


def select(state: State, rows) -> State:
    """Some rows of a batch's state: a slice, or indices."""
    return tree_map(lambda t: t[rows], state)


def join(states: list[State] | tuple[State, ...]) -> State:
    """The rows of several states as one batch.

    Where tensors differ in their second dimension, the places of what was read, the shorter ones get zeros in front.
    """

    def joined(*rows: Tensor) -> Tensor:
        if rows[0].dim() > 1 and len({t.shape[1] for t in rows}) > 1:
            longest = max(t.shape[1] for t in rows)
            rows = tuple(torch.cat([t.new_zeros(len(t), longest - t.shape[1], *t.shape[2:]), t], 1) for t in rows)
        return torch.cat(rows)

    first, *others = states
    return tree_map(joined, first, *others)


def detach(state: State, requires_grad: bool = False) -> State:
    """The same values without their history."""
    return tree_map(lambda t: t.detach().requires_grad_(requires_grad), state)


def tensors_of(state: State) -> list[Tensor]:
    return [] if state is None else tree_leaves(state)


# ---------------------------------------------------------------- sizes


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model, all of which its file tells. A model adds its own."""

    vocab_size: int
    n_layer: int
    n_embd: int


@dataclass(frozen=True)
class Execution:
    """How a model computes; nothing of it changes what is computed but for rounding."""

    op: str = "auto"  # kernel of the recurrence: one of ops.recurrence.OPS
    grad_cp: bool = False  # gradient checkpointing: blocks are recomputed in the backward pass


USUAL = Execution()


class WebNames(NamedTuple):
    """How web-rwkv names and lays out a model's tensors, for interop/web_rwkv.py."""

    renamed: Mapping[str, str]  # part of a name here -> there
    transposed: tuple[str, ...]  # ends of the names whose last two dimensions are swapped there


class GGUFTensor(NamedTuple):
    """A tensor as llama.cpp reads it, and how it is made, for interop/gguf.py."""

    name: str  # there
    parameters: tuple[str, ...]  # here, of which it is made
    make: Callable[..., Tensor]  # of their tensors


class OwnText(NamedTuple):
    """What the files of a model say of its text."""

    tokenizer: str  # a tokenizer.json: its path, or its text
    template: str  # its chat template in jinja2, "" where there is none
    tokens: Mapping[str, str]  # bos_token, eos_token, ...
    ends: tuple[int, ...]  # tokens at which an answer ends


# ---------------------------------------------------------------- models

# The best constant rates of tiny-rwkv6-1m, whose width is 64 (docs/comparison.md), by PEFT method; "none": full training.
RATES = {"none": 3e-4, "bone": 1e-3, "bone_col": 1e-3, "miss": 1e-3, "lora": 5e-3, "rslora": 1e-3, "lora_plus": 6e-4,
         "pissa": 2.5e-3, "olora": 2.5e-3, "lora_ga": 3e-4, "dora": 4e-3}  # fmt: skip
RATES_POWER = 0.75

FEATURES = {
    "infctx": "state to carry from chunk to chunk",
    "state": "initial state to train",
    "pack": "way to keep documents in one row apart",
    "op": "choice of kernels",
}


class LanguageModel(nn.Module):
    """A causal language model over tokens, with the parameters' names and order of its file.

    Its layers that adapters may sit on are `nn.Linear`s; `head` is one of them and makes logits of what `hidden` gives.
    """

    version: ClassVar[str]  # "x060", ...: the registry's key
    title: ClassVar[str]  # for people
    targets: ClassVar[tuple[str, ...]]  # parts that get an adapter by default
    rates: ClassVar[Mapping[str, float]] = RATES  # recommended ones, measured at a width of `rates_width`
    rates_width: ClassVar[int] = 64
    full_parts: ClassVar[tuple[str, ...]]  # names of the parts that may be trained in full beside an adapter
    capabilities: ClassVar[frozenset[str]] = frozenset()  # keys of FEATURES
    runs_on_meta: ClassVar[bool] = False  # whether a step can be run on the meta device: nothing looks at values
    l2wrap: ClassVar[bool] = True  # whether RWKV's L2Wrap is added to the loss by default
    template: ClassVar[str] = "world"  # default template of prompts and answers
    web_names: ClassVar[WebNames | None] = None  # None: web-rwkv has no such model
    gguf_architecture: ClassVar[str] = ""  # llama.cpp's name of the model; "": it has no such model
    suffixes: ClassVar[tuple[str, ...]] = ()  # ends of the names of files for `read_file`
    releases: ClassVar[Mapping[str, Mapping[str, int]]] = {}  # sizes of published models that tables for people name

    sizes: Any  # a subclass of Sizes
    head: nn.Linear
    file: str = ""  # that it was read from; "": a new model
    fingerprint: str = "new"  # what tells the loaded weights from others; see files/models.py
    file_dtype: torch.dtype = torch.bfloat16  # of the file that the model came from, or will become
    text: OwnText | None = None  # the tokenizer and the template that came with the weights

    def __init__(self, sizes: Any, execution: Execution = USUAL):
        super().__init__()
        self.sizes, self.execution = sizes, execution

    def cannot(self, feature: str) -> str:
        """Why the model does not have one of the `FEATURES`; "" where it has it."""
        return "" if feature in self.capabilities else f"{self.title} has no {FEATURES[feature]}"

    # ------------------------------------------------ computing

    def hidden(self, idx: Tensor, state: State = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """What the head is applied to, (B, T, C), and the state after it.

        idx (B, T) int64, T >= 1. state: of what came before, None at the beginning; a sequence in chunks, each with the state of
        the one before, gives what the whole gives. reset (B, T) bool marks the first token of each packed document; the slot
        before it is a separator, whose token means nothing.
        """
        raise NotImplementedError

    def forward(self, idx: Tensor, state: State = None, reset: Tensor | None = None) -> tuple[Tensor, State]:
        """Logits (B, T, V) after each token of idx (B, T), and the state after it; see `hidden`."""
        x, state = self.hidden(idx, state, reset)
        return self.head(x), state

    def stages(self) -> Iterator[tuple[str, nn.Module, Callable[[Any], Any]]]:
        """The forward pass of a whole sequence cut into stages: (prefix of names, module, function).

        The first function takes idx (B, T), each other what the one before returned, the last returns logits (B, T, V). A
        function uses the parameters of its module alone, which are those whose names begin with the prefix. Between two
        stages tensors may be cast and modules replaced.
        """
        raise NotImplementedError

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> "LanguageModel":
        """Fill every parameter with the initial values of a new model."""
        raise NotImplementedError

    def shortened(self, layers: int) -> "LanguageModel":
        """A model of the first `layers` layers that shares everything with this one."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    def with_execution(self, **changes) -> "LanguageModel":
        """The same tensors, computed in another way."""
        other = copy.copy(self)
        other.execution = replace(self.execution, **changes)
        return other

    def for_sampling(self) -> "LanguageModel":
        """The same model, at less cost a call, for as long as its tensors and modules stay as they are."""
        return self

    # ------------------------------------------------ what parameters are

    def part_of(self, name: str) -> str:
        """The part that a parameter belongs to, for tables: one of `full_parts`, or a layer's name within its block."""
        found = (part for part in self.full_parts if self.in_part(name, part))
        return next(found, re.sub(r"^\D+\.\d+\.|\.(weight|bias)$", "", name))

    @classmethod
    def in_part(cls, name: str, part: str) -> bool:
        """Whether a parameter belongs to one of `full_parts`."""
        raise NotImplementedError

    def train_parts(self, parts: Iterable[str]) -> list[str]:
        """Let some of `full_parts` train in full. Returns the parameters' names; UserError for an unknown part."""
        parts = list(parts)
        for part in parts:
            if part not in self.full_parts:
                raise UserError(f"{part} is no part of {self.title}; there are {', '.join(self.full_parts)}")
        names = [name for name, _ in self.named_parameters() if any(self.in_part(name, part) for part in parts)]
        for name in names:
            self.get_parameter(name).requires_grad_(True)
        return names

    def lr_multiplier(self, name: str) -> float:
        """How much faster than the others a parameter of the base learns, by the model's own trainer."""
        return 1.0

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a parameter of the base, by the model's own trainer."""
        return name.endswith(".weight") and self.get_parameter(name).dim() == 2

    def recommended_rate(self, method: str) -> float:
        """A learning rate to begin with, for a PEFT method, for "none" (full training) or for "state" (state tuning).

        Measured at one width and lowered as n_embd^-0.75, an interpolation: from RWKV's width 64 to 4096 it gives Bone 4e-5, LoRA
        2e-4 and full training 1e-5, where published recipes for models of that width have 2e-5, 2e-4 and 1e-5 to 2e-5. An adapter
        of another method gets Bone's.
        """
        if method == "state" and (reason := self.cannot("state")):
            raise UserError(reason)
        rate, width = self.rates.get(method, self.rates["bone"]), self.rates_width
        return float(f"{rate * (width / max(self.sizes.n_embd, width)) ** RATES_POWER:.0e}")

    # ------------------------------------------------ state tuning

    @classmethod
    def is_initial_state(cls, name: str) -> bool:
        """Whether that is the name of a trained initial state."""
        return False

    def add_initial_state(self) -> list[str]:
        """Give the model a trainable initial state of zeros where it has none; return the names of its tensors."""
        raise UserError(f"{self.title} has no initial state to train")

    # ------------------------------------------------ for people

    def describe(self) -> str:
        """Version and sizes in a line."""
        return f"{self.title}, {', '.join(f'{name} {size}' for name, size in asdict(self.sizes).items())}"

    def kernels(self, device: str, dtype: torch.dtype) -> str:
        """What computes the recurrence on that kind of device, "" where there is none."""
        return ""

    def cuda_extra_bytes(self, B: int, T: int) -> int:
        """Bytes that a layer keeps for backward on a GPU beyond what it keeps on a CPU."""
        return 0

    # ------------------------------------------------ files

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        """Whether a file's tensors are this model's, by their names."""
        raise NotImplementedError

    @classmethod
    def recognises_config(cls, config: Mapping[str, Any]) -> bool:
        """Whether a folder with that config.json holds this model."""
        return False

    @classmethod
    def sizes_of_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> Any:
        """As `sizes_of`, of a folder with that config.json."""
        raise NotImplementedError

    @classmethod
    def read_file(cls, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
        """Of a file with one of `suffixes`, what it would be as a folder: config.json, tensors, texts of other files by name."""
        raise NotImplementedError

    @classmethod
    def new_sizes(cls, **given: int) -> Any:
        """Sizes of a new model, with defaults for what is not given or 0; UserError for what cannot be."""
        raise NotImplementedError

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], source: str) -> Any:
        """The sizes of a model from its tensors' shapes; UserError, naming `source`, unless `check` holds."""
        raise NotImplementedError

    @classmethod
    def parameter_name(cls, file_name: str) -> str:
        """The parameter's name here of a tensor's name in a file."""
        return file_name

    @classmethod
    def gguf_metadata(cls, sizes: Any, source: str) -> dict[str, int | float]:
        """What llama.cpp demands under `gguf_architecture`; UserError, naming `source`, for sizes that it cannot have."""
        raise NotImplementedError

    @classmethod
    def gguf_tensors(cls, sizes: Any) -> Iterator[GGUFTensor]:
        """All tensors of the model as llama.cpp reads them."""
        raise NotImplementedError

    @classmethod
    def copies(cls, sizes: Any) -> Mapping[str, str]:
        """Tensors that a file may hold as copies of a parameter: their names there -> the parameter's here."""
        return {}

    @classmethod
    def shapes(cls, sizes: Any, initial_state: bool = False) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every parameter, in the file's order; `initial_state`: with that of a state-tuned model."""
        with torch.device("meta"):
            model = cls(sizes)
            if initial_state:
                model.add_initial_state()
            return {name: tuple(value.shape) for name, value in model.state_dict().items()}

    @classmethod
    def check(cls, sizes: Any, tensors: Mapping[str, Tensor], source: str) -> None:
        """Compare names and shapes with what the sizes demand: a file is used whole or not at all."""
        wanted = cls.shapes(sizes)
        missing = [key for key in wanted if key not in tensors]
        unknown = [key for key in tensors if key not in wanted]
        if missing or unknown:
            parts = [
                f"{len(keys)} {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
                for what, keys in (("missing", missing), ("unknown", unknown))
                if keys
            ]
            raise UserError(f"{source}: not a whole {cls.title} model of {sizes.n_layer} layers: {' and '.join(parts)} tensors")
        for key, shape in wanted.items():
            if tuple(tensors[key].shape) != shape:
                got = tuple(tensors[key].shape)
                raise UserError(f"{source}: {key} is {got}, the other tensors of the file ask for {shape}")
