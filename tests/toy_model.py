"""A language model of another kind than RWKV, for the tests of the seam: a gated linear recurrence with another state, other
names in its files than its parameters have, and a bias in one of its projections.

    h_t = a_t h_{t-1} + (1 - a_t) v_t,  a_t = sigmoid(gate x_t);   x_t += out (h_t * silu(v_t))
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rwkv_bone.models.base import USUAL, Execution, LanguageModel, Sizes

FILE_NAMES = {"tokens.": "model.embed.", "layers.": "model.layer_", ".mix.": ".recurrence.", "head.": "lm_head."}  # here -> file


@dataclass(frozen=True)
class ToySizes(Sizes):
    width: int


class Mix(nn.Module):
    def __init__(self, sizes: ToySizes):
        super().__init__()
        self.gate = nn.Linear(sizes.n_embd, sizes.width)
        self.value = nn.Linear(sizes.n_embd, sizes.width, bias=False)
        self.out = nn.Linear(sizes.width, sizes.n_embd, bias=False)

    def forward(self, x: Tensor, h: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        a, v = torch.sigmoid(self.gate(x)), self.value(x)
        kept = a if reset is None else a.masked_fill(reset.unsqueeze(-1), 0)  # a document begins without what came before
        hs = []
        for t in range(x.shape[1]):
            h = kept[:, t] * h + (1 - a[:, t]) * v[:, t]
            hs.append(h)
        return self.out(torch.stack(hs, 1) * F.silu(v)), h


class Layer(nn.Module):
    def __init__(self, sizes: ToySizes):
        super().__init__()
        self.norm = nn.LayerNorm(sizes.n_embd)
        self.mix = Mix(sizes)

    def forward(self, x: Tensor, h: Tensor, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        delta, h = self.mix(self.norm(x), h, reset)
        return x + delta, h


class Toy(LanguageModel):
    version, title = "toy", "Toy"
    targets, full_parts = ("mix",), ("norms", "head")
    capabilities = frozenset({"infctx", "pack"})
    l2wrap = False

    def __init__(self, sizes: ToySizes, execution: Execution = USUAL):
        super().__init__(sizes, execution)
        self.tokens = nn.Embedding.from_pretrained(torch.empty(sizes.vocab_size, sizes.n_embd), freeze=False)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.n_layer))
        self.norm = nn.LayerNorm(sizes.n_embd)
        self.head = nn.Linear(sizes.n_embd, sizes.vocab_size, bias=False)

    def hidden(self, idx: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, Any]:
        x, new = self.tokens(idx), {}
        for i, layer in enumerate(self.layers):
            h = x.new_zeros(len(x), self.sizes.width) if state is None else state[f"h{i}"]
            run = partial(checkpoint, layer, use_reentrant=False) if self.execution.grad_cp else layer
            x, new[f"h{i}"] = run(x, h, reset)
        return self.norm(x), new

    def stages(self) -> Iterator[tuple[str, nn.Module, Callable[[Any], Any]]]:
        yield "tokens.", self.tokens, lambda idx: self.tokens(idx)
        for i in range(len(self.layers)):
            yield f"layers.{i}.", self.layers[i], partial(self._stage, i)
        yield "norm.", self.norm, lambda x: self.norm(x)
        yield "head.", self.head, lambda x: self.head(x)

    def _stage(self, i: int, x: Tensor) -> Tensor:
        return self.layers[i](x, x.new_zeros(len(x), self.sizes.width))[0]

    def shortened(self, layers: int) -> "Toy":
        short = self.with_execution()
        short._modules = {**self._modules, "layers": self.layers[:layers]}
        return short

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> "Toy":
        generator = torch.Generator().manual_seed(seed or 0)
        for name, p in self.named_parameters():
            p.copy_(torch.ones_like(p) if "norm.weight" in name else torch.randn(p.shape, generator=generator) / 4)
        return self

    def part_of(self, name: str) -> str:
        return "norms" if "norm" in name else re.sub(r"^layers\.\d+\.|\.weight$", "", name)

    @classmethod
    def in_part(cls, name: str, part: str) -> bool:
        return "norm" in name if part == "norms" else name.startswith(f"{part}.")

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        return "model.embed.weight" in tensors

    @classmethod
    def new_sizes(cls, **given: int) -> ToySizes:
        return ToySizes(given["vocab_size"], given["n_layer"], given["n_embd"], 2 * given["n_embd"])

    @classmethod
    def sizes_of(cls, tensors: Mapping[str, Tensor], source: str) -> ToySizes:
        layers = {name.split(".")[1] for name in tensors if name.startswith("layers.")}
        sizes = ToySizes(*tensors["tokens.weight"].shape[:1], len(layers), tensors["tokens.weight"].shape[1],
                         len(tensors["layers.0.mix.gate.bias"]))  # fmt: skip
        cls.check(sizes, tensors, source)
        return sizes

    @classmethod
    def parameter_name(cls, file_name: str) -> str:
        for ours, theirs in FILE_NAMES.items():
            file_name = file_name.replace(theirs, ours)
        return file_name


def file_name(name: str) -> str:
    """A parameter's name in a file."""
    for ours, theirs in FILE_NAMES.items():
        name = name.replace(ours, theirs)
    return name
