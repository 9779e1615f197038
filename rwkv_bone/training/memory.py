"""How much memory training takes: found by running one step on tensors that have sizes and no memory, before the first real one.

`python -m rwkv_bone.training.memory` prints what released models take; see docs/memory.md.
"""

import contextlib
import copy
import itertools
import math
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import TrainConfig
from ..errors import run
from ..models import MODELS, Execution, LanguageModel
from ..models.base import tensors_of
from ..peft import METHODS, inject
from ..peft.adapter import QuantisedWeight, projections
from .infctx import backward_in_chunks
from .loss import HeadCrossEntropy
from .optimiser import OPTIMISERS
from .shapes import rule
from .strategies import BUCKET

LAYERS = 3  # that are run: a layer more takes what the last of them took
CHUNKS = 3  # of infctx that are run
TOKENS = 1 << 19  # of a micro batch that are run at most: the time to run them grows with their number
CUDA_ITSELF = 700 << 20  # context, kernels, workspaces of the libraries and of Bone


class Alive(TorchDispatchMode):
    """Within it, counts the bytes of tensors that were made and are still alive, and the most there were at once."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what torch does about its compiler here by default imports that, for a second

    def __init__(self, rule: Callable[[Any], Callable[..., Any]]):
        super().__init__()
        self.rule = rule  # what computes an operation
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = self.rule(op)(*args, **(kwargs or {}))
        for t in (result,) if isinstance(result, Tensor) else tree_leaves(result):
            if isinstance(t, Tensor):
                self.add(t.untyped_storage())
        return result

    def add(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self.known:
            self.known.add(storage._cdata)
            self.bytes += storage.nbytes()
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self.remove, storage._cdata, storage.nbytes())

    def remove(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.bytes -= size


class Dense(QuantisedWeight):
    """Stands for a quantised weight where only sizes count: its own program takes no tensors without memory."""

    place = "meta"

    def dense(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=self.place)


def on_meta(t: Tensor) -> Tensor:
    """A tensor without memory that is like t."""
    like = torch.empty_like(t, device="meta")
    return nn.Parameter(like, requires_grad=t.requires_grad) if isinstance(t, nn.Parameter) else like


def step_bytes(model: LanguageModel, B: int, T: int, config: TrainConfig, layers: int) -> int:
    """`run_bytes`, where there are too many rows to run them: a row more takes what the last ones took."""
    length = min(T, CHUNKS * config.chunk_ctx) if config.train_type == "infctx" else T
    most = max(2, TOKENS // length)
    if most >= B:
        return run_bytes(model, B, T, config, layers)
    fewer, more = (run_bytes(model, rows, T, config, layers) for rows in (most // 2, most))
    return more + (B - most) * (more - fewer) // (most - most // 2)


def run_bytes(model: LanguageModel, B: int, T: int, config: TrainConfig, layers: int) -> int:
    """The most that forward and backward of a (B, T) batch take, gradients included, in a model of that many layers."""
    op = "torch" if model.execution.op == "torch" else "cpu" if model.runs_on_meta else "auto"
    short = model.shortened(layers).with_execution(op=op, grad_cp=config.grad_cp)
    l2wrap = config.wants_l2wrap(model)
    chunks = math.ceil(T / config.chunk_ctx) if config.train_type == "infctx" else 1
    run_chunks = min(chunks, CHUNKS)  # a chunk more keeps its border's state more, and no more than that
    length = T if chunks == 1 else T - (chunks - run_chunks) * config.chunk_ctx
    mode: Any = contextlib.nullcontext()
    imitation, place, alive = on_meta, "meta", Alive(rule)
    if not model.runs_on_meta:
        from torch._subclasses.fake_tensor import FakeTensorMode  # imports torch's compiler

        mode = FakeTensorMode()
        imitation, place, alive = mode.from_tensor, "cpu", Alive(lambda op: op)
    known: dict[int, Any] = {id(t): imitation(t) for t in (*short.parameters(), *short.buffers())}
    alive.known = {t.untyped_storage()._cdata for t in known.values()}
    for weight in short.modules():
        if isinstance(weight, QuantisedWeight):
            known[id(weight)] = Dense(weight)
            known[id(weight)].place = place
    short = copy.deepcopy(short, known)
    border = 0

    def forward(piece, state):
        nonlocal border
        reset = torch.zeros_like(piece["idx"], dtype=torch.bool) if config.dataload == "pack" else None
        hidden, state = short.hidden(piece["idx"], state, reset)
        border = bytes_of(tensors_of(state))
        # every token counts as trained
        loss = HeadCrossEntropy.apply(hidden.flatten(0, 1), short.head.weight, piece["idx"].flatten(), l2wrap)
        return loss, state

    with mode, alive:
        idx = torch.zeros(B, length, dtype=torch.long, device=place)
        for p in short.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad and config.accumulate_grad_batches > 1 else None
        if config.train_type == "infctx":
            pieces = {"idx": idx, "targets": idx}
            backward_in_chunks(forward, pieces, config.chunk_ctx, config.truncate, lambda loss, last: loss.backward())
        else:
            forward({"idx": idx}, None)[0].backward()
    return alive.peak + (0 if config.truncate else (chunks - run_chunks) * border)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def estimate(model: LanguageModel, B: int, T: int, config: TrainConfig, world: int = 1, cuda: bool = False) -> dict[str, int]:
    """Bytes by part that each of `world` devices takes at the most, for micro batches of B rows of T tokens."""
    trained = [p for p in model.parameters() if p.requires_grad]
    numbers = sum(p.numel() for p in trained)
    low = sum(p.numel() for p in trained if p.element_size() < 4)  # of which the optimiser keeps float32 masters
    L = model.sizes.n_layer
    much = 2 * numbers > sum(p.numel() for p in model.parameters())
    if much or L <= LAYERS:  # where much trains, the peak of a short model lies at another place
        step = step_bytes(model, B, T, config, L)
    else:
        fewer, more = (step_bytes(model, B, T, config, layers) for layers in (LAYERS - 1, LAYERS))
        step = more + (L - LAYERS) * (more - fewer)
    if cuda:
        step += (1 if config.grad_cp else L) * B * model.cuda_extra_bytes(1, T)
    parts = {
        "base weights": bytes_of(p for p in (*model.parameters(), *model.buffers()) if not p.requires_grad),
        "trained weights": bytes_of(trained) + 4 * low,
        "optimiser": OPTIMISERS[config.optim].bytes * numbers,
        "activations and gradients": max(step, 4 * numbers),
    }
    if config.strategy.startswith("deepspeed"):
        stage, offload = int(config.strategy[16]), config.strategy.endswith("offload")
        parts["trained weights"] = bytes_of(trained)
        parts["optimiser"] = 0 if offload else (OPTIMISERS[config.optim].bytes + 4) * numbers // world  # with float32 masters
        if stage == 3:
            parts["base weights"] = 0 if offload else parts["base weights"] // world
            parts["trained weights"] = 0 if offload else parts["trained weights"] // world
        parts["exchange"] = 2 * 4 * BUCKET
    elif world > 1:
        parts["exchange"] = 2 * 4 * min(numbers, BUCKET)
    if cuda:
        parts["CUDA"] = CUDA_ITSELF
    return parts


RELEASES = {name: (version, sizes) for version in reversed(MODELS) for name, sizes in MODELS[version].releases.items()}
METHODS_SHOWN = (("bone", 64), ("none", 0))
CARDS = (8, 12, 16, 24, 48, 80)  # GB
BITS = {"none": 0, "int8": 8, "nf4": 4.5}


def released(release: str, peft: str, r: int) -> tuple[LanguageModel, list[int]]:
    """A model of a release's sizes in bf16 with adapters, on the meta device, and the numbers of entries of its projections."""
    version, sizes = RELEASES[release]
    with torch.device("meta"):
        model = MODELS[version](MODELS[version].new_sizes(**sizes), Execution()).to(torch.bfloat16)
    entries = [model.get_parameter(f"{name}.weight").numel() for name in projections(model)]
    if peft != "none":
        inject(model, METHODS[peft], METHODS[peft].config_from({"r": r}, peft), start=False)
    return model, entries


def card_for(size: float) -> str:
    """The smallest card that holds so many bytes and leaves a tenth for what its allocator cannot use."""
    fitting = [card for card in CARDS if size * 1.1 < card * 10**9]
    return f"{fitting[0]} GB" if fitting else "-"


LENGTHS = (512, 2048, 8192)


def table_rows(release: str, peft: str, r: int) -> list[str]:
    """Of the table in docs/memory.md, the rows of a release and a method, one for each kind of base weights."""
    steps = []
    model, entries = released(release, peft, r)
    for T, grad_cp in itertools.product(LENGTHS, (False, True)):
        parts = estimate(model, 1, T, TrainConfig(data_file="-", peft=peft, grad_cp=grad_cp), cuda=True)
        steps.append(sum(parts.values()) - parts["base weights"])
    rows = []
    for quant in BITS if peft != "none" else ("none",):
        base = parts["base weights"]
        if quant != "none":  # two bytes less, and one projection's weight at a time is made dense
            base += int(sum(entries) * (BITS[quant] / 8 - 2)) + 2 * max(entries)
        name = f"{peft}, r {r}" if r else peft
        cells = " | ".join(f"{(base + step) / 10**9:.1f}: {card_for(base + step)}" for step in steps)
        rows.append(f"| {release} | {name} | {quant} | {cells} |")
    return rows


def main() -> None:
    print("| model | `--peft` | `--quant` |" + "".join(f" {T} | {T}, `--grad_cp 1` |" for T in LENGTHS))
    print("|---" * (3 + 2 * len(LENGTHS)) + "|")
    for release, (peft, r) in itertools.product(RELEASES, METHODS_SHOWN):
        print("\n".join(table_rows(release, peft, r)), flush=True)


if __name__ == "__main__":
    run(main)
