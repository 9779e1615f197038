"""Whether the written file computes what base + adapters compute: on 32 tokens, in float32, stage by stage.

Only one stage of one model (a block, or the head) is in memory at a time, in float32; the file's pages are given back as soon as
they are converted, and of the embedding only the tokens' rows are read.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..files.adapters import Adapter
from ..files.models import by_parameter, file_tensors
from ..files.pth import Streamed, give_back, trim
from ..models import Execution, LanguageModel
from ..peft.adapter import row_panels, weight_and_bias
from .merge import Merge

PIECE = 16 << 20  # bytes


class Staged:
    """A model whose parameters are read when a stage needs them, by `tensor(name, shape)` from `file`, and forgotten after it."""

    def __init__(
        self,
        model: LanguageModel,
        file: Streamed,
        tensor: Callable[[str, tuple[int, ...]], Tensor],
        adapter: Adapter | None = None,
    ):
        self.model, self.stages, self.file, self.tensor, self.adapter = model, model.stages(), file, tensor, adapter

    def run(self, x: Any) -> Any:
        """The next stage."""
        prefix, module, function = next(self.stages)
        # of an embedding only the tokens' rows are read
        lookup = type(module) is nn.Embedding and isinstance(x, Tensor) and not x.is_floating_point()
        values = {name: self.value(prefix + name, tuple(t.shape)) for name, t in module.state_dict().items()}
        module.load_state_dict(values if lookup else {name: self.widened(t) for name, t in values.items()}, assign=True)
        give_back(self.file.tensors.values())
        if self.adapter is not None:
            self.adapt(self.adapter, prefix)
        x = tree_map(lambda t: t.float() if lookup and isinstance(t, Tensor) else t, function(x))
        self.model.get_submodule(prefix.removesuffix(".")).to_empty(device="meta")
        trim()
        return x

    def value(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A parameter as the file has it, or as it was trained in full."""
        if self.adapter is not None and name in self.adapter.parts:
            return self.adapter.tensors[name]
        return self.tensor(name, shape)

    def widened(self, tensor: Tensor) -> Tensor:
        """The tensor in float32; of a large one the file's pages are given back piece by piece."""
        if tensor.nbytes <= PIECE or tensor.dtype == torch.float32:
            return tensor.float()
        result = torch.empty(tensor.shape, dtype=torch.float32)
        for rows in row_panels(len(tensor), max(1, PIECE * len(tensor) // tensor.nbytes)):
            result[rows] = tensor[rows]
            give_back(self.file.tensors.values())
        return result

    def adapt(self, adapter: Adapter, prefix: str) -> None:
        """Put the adapter on the projections of the stage whose parameters' names begin with `prefix`."""
        for name in adapter.layers:
            if f"{name}.".startswith(prefix):
                self.model.set_submodule(name, adapter.layer(name, *weight_and_bias(self.model, name)))


def empty_model(job: Merge, initial_state: bool = False) -> LanguageModel:
    with torch.device("meta"):
        model = job.kind(job.sizes, Execution(op="torch"))
        if initial_state:
            model.add_initial_state()
    return model


@torch.no_grad()
def verify(job: Merge, output: Path) -> str:
    """Compare base + adapters with the written file, on 32 tokens from all over the vocabulary."""
    written = Streamed(lambda: by_parameter(job.kind, job.sizes, file_tensors(output)))
    state = job.initial_state
    models = [
        Staged(empty_model(job), job.base, lambda name, _: job.base[name]),
        Staged(empty_model(job, state), job.base, job.before, job.adapters[-1] if job.adapters else None),
        Staged(empty_model(job, state), written, lambda name, _: written[name]),
    ]
    idx = (torch.arange(1, 33) * 7919 % job.sizes.vocab_size)[None]
    passed: list[Any] = [idx] * len(models)
    for _ in job.model.stages():
        passed = [model.run(x) for model, x in zip(models, passed)]
    base, adapted, merged = (logits[0] for logits in passed)
    same = int((adapted.argmax(1) == merged.argmax(1)).sum())
    return (
        f"verified   logits of the written file are within {(merged - adapted).abs().max():.3g} of base + adapter's, which are "
        f"up to {(adapted - base).abs().max():.3g} from the base's; same next token at {same} of {idx.shape[1]} positions"
    )
