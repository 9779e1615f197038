"""Programs that are not ours, as judges."""

import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch


def rwkv_package(path: Path, tokens: list[int], wkv: list[torch.Tensor] | None = None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits (T, V) in float32 and the state after them, from the `rwkv` package; `wkv`: each layer's state to begin with.

    It computes ln0(emb) in the file's dtype: give it a float32 file.
    """
    v7 = any(name.endswith(".att.r_k") for name in torch.load(path, mmap=True, weights_only=True))
    return _process(v7).submit(_run, path.with_suffix(""), tokens, wkv).result()


def rwkv_package_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    return rwkv_package(path, tokens)[0]


def rwkv_package_generate(path: Path, prompts: list[list[int]], max_tokens: int, **sampling) -> list[list[int]]:
    """The tokens that the package's own `generate` samples after each prompt; sampling: its PIPELINE_ARGS."""
    v7 = any(name.endswith(".att.r_k") for name in torch.load(path, mmap=True, weights_only=True))
    return _process(v7).submit(_generate, path.with_suffix(""), prompts, max_tokens, sampling).result()


@functools.cache
def _process(v7: bool) -> ProcessPoolExecutor:
    """A process of its own for each version: the package reads its settings as it is imported."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _settings, (v7,))


def _settings(v7: bool) -> None:
    os.environ.update(RWKV_V7_ON=str(int(v7)), RWKV_CUDA_ON="0", RWKV_JIT_ON="0")


def _generate(path: Path, prompts: list[list[int]], max_tokens: int, sampling: dict) -> list[list[int]]:
    from rwkv.model import RWKV
    from rwkv.utils import PIPELINE, PIPELINE_ARGS

    made, found = object.__new__(PIPELINE), []
    made.model, made.encode, made.decode = RWKV(model=str(path), strategy="cpu fp32"), list, lambda tokens: ""

    def sample_logits(*args, **kwargs):
        found[-1].append(PIPELINE.sample_logits(made, *args, **kwargs))
        return found[-1][-1]

    made.sample_logits = sample_logits
    for prompt in prompts:
        found.append([])
        made.generate(prompt, max_tokens, PIPELINE_ARGS(**sampling))
    return found


@torch.no_grad()
def _run(path: Path, tokens: list[int], wkv: list[torch.Tensor] | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
    from rwkv.model import RWKV

    model = RWKV(model=str(path), strategy="cpu fp32")
    state = None
    if wkv is not None:
        state = model.generate_zero_state() if hasattr(model, "generate_zero_state") else model.forward(tokens[:1], None)[1]
        state = [wkv[i // 3] if i % 3 == 1 else torch.zeros_like(layer) for i, layer in enumerate(state)]
    logits, state = model.forward(tokens, state, full_output=True)
    return logits.clone(), [layer.clone() for layer in state]
