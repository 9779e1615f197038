"""Causal language models of Hugging Face transformers behind the seam: LLaMA, Mistral, Qwen, Gemma, SmolLM and their like.

A model is a folder (config.json, safetensors, tokenizer.json) or a .gguf file, which transformers dequantises. Parameters have
the names of the folder's files. What transformers must look like inside: a decoder `model` with `embed_tokens`, `layers` and
`norm`, and logits that are the product with `lm_head`, or with the embedding where the two are tied.

transformers is the extra `hf`. It is imported here alone, and only where a model is made.
"""

import contextlib
import copy
import functools
import inspect
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..errors import UserError
from .base import USUAL, Execution, LanguageModel, Sizes

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
CONSTANTS = ("rotary_emb.inv_freq",)  # in older files, LLaMA 2's among them; transformers computes them
# Settings under which logits are not the head's product alone, and the value at which they do nothing.
HEAD_ONLY = {"final_logit_softcapping": None, "logits_scaling": 1.0, "logit_scale": None}

# From the sweeps of docs/comparison.md on SmolLM2-135M-Instruct, whose width is 576: the lowest rate whose held-out loss is
# within 2% of what training gains (0.68 nats) of the method's best. A lower rate forgets less.
RATES = {"bone": 3e-4, "bone_col": 3e-4, "miss": 3e-4, "lora": 3e-3, "rslora": 1e-3, "lora_plus": 1e-3, "dora": 3e-3,
         "pissa": 1e-3, "olora": 3e-4, "lora_ga": 1e-4, "none": 1e-4}  # fmt: skip


@dataclass(frozen=True)
class HFSizes(Sizes):
    config: dict[str, Any] = field(default_factory=dict)  # config.json


class CacheState(NamedTuple):
    """What attention remembers of S places. Places before a row's first token are not `valid`."""

    valid: Tensor  # (B, S) bool
    layers: list[tuple[Tensor, Tensor]]  # keys and values, (B, S, H, D)


class TiedHead:
    """Logits by the embedding's weight, which stays the embedding's."""

    bias = None

    def __init__(self, embedding: nn.Module):
        self.embedding = embedding

    @property
    def weight(self) -> Tensor:
        return self.embedding.weight  # type: ignore[return-value]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@functools.cache
def transformers() -> Any:
    try:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers
    except ImportError:
        raise UserError("Hugging Face models need transformers; pip install 'rwkv-bone[hf]'") from None
    if int(transformers.__version__.partition(".")[0]) < 5:
        raise UserError(f"transformers {transformers.__version__} is too old; pip install 'transformers>=5'")
    return transformers


@contextlib.contextmanager
def one_document_a_row() -> Iterator[None]:
    """Within it transformers does not look for packed documents in the positions.

    Looking waits for the GPU, and where tensors have no values (memory estimates) it takes every row for packed: then attention
    gets a mask of (B, 1, T, T), and keys and values once a head.
    """
    masking = transformers().masking_utils
    looked = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = looked


def read_config(config: Mapping[str, Any], source: str) -> Any:
    """config.json as transformers has it; UserError for a model that it, or this program, does not have."""
    kind = config.get("model_type")
    known = transformers().models.auto.configuration_auto.CONFIG_MAPPING
    if kind not in known:
        raise UserError(f"{source}: transformers {transformers().__version__} has no model_type {kind!r}; a newer one may")
    if "quantization_config" in config:
        raise UserError(f"{source}: holds quantised weights; wanted bfloat16, float16 or float32 (--quant quantises them)")
    try:
        made = known[kind].from_dict(dict(config))
    except Exception as error:  # its checks raise what they like
        what = " ".join(str(error).split())[:300]
        raise UserError(f"{source}: transformers cannot read its config.json: {what}") from None
    for name, harmless in HEAD_ONLY.items():
        if getattr(made, name, harmless) not in (harmless, None):
            setting = f"{name} {getattr(made, name)}"
            raise UserError(f"{source}: {setting} in config.json: logits beyond the head's product are not trained here")
    return made


def build(config: Mapping[str, Any], source: str = "config.json") -> Any:
    """transformers' model of a config.json, its parameters without memory; its own constants (rotary frequencies) are made."""
    made = read_config(config, source)
    auto = transformers().AutoModelForCausalLM
    if type(made) not in auto._model_mapping:
        raise UserError(f"{source}: {made.model_type} is no causal language model of transformers")
    with torch.device("meta"):
        whole = auto.from_config(made, dtype=torch.float32)
    decoder, head = getattr(whole, "model", None), getattr(whole, HEAD, None)
    there = [type(getattr(decoder, name, None)) for name in ("embed_tokens", "layers", "norm")]
    plain_head = type(head) is nn.Linear and head.bias is None
    if not (plain_head and issubclass(there[0], nn.Embedding) and there[1] is nn.ModuleList and there[2] is not type(None)):
        wanted = "embed_tokens, layers, norm and a plain lm_head"
        raise UserError(f"{source}: {made.model_type} of transformers is not made of {wanted}; it cannot be trained here")
    with torch.device("cpu"):
        for module in whole.modules():
            if module._non_persistent_buffers_set:
                for name in module._non_persistent_buffers_set:
                    setattr(module, name, torch.empty_like(getattr(module, name), device="cpu"))
                whole._init_weights(module)
    return whole


class HF(LanguageModel):
    """A causal language model of transformers. Its parameters are on the meta device until a file's are assigned."""

    version, title = "hf", "Hugging Face model"
    targets, full_parts = ("self_attn", "mlp"), ("embed_tokens", "lm_head", "norm")
    capabilities = frozenset({"pack"})
    l2wrap = False
    suffixes = (".gguf",)
    rates, rates_width = RATES, 576

    def __init__(self, sizes: HFSizes, execution: Execution = USUAL):
        super().__init__(sizes, execution)
        whole = build(sizes.config)
        self.model = whole.model
        if not whole.config.tie_word_embeddings:
            self.lm_head = whole.lm_head
        parameters = inspect.signature(type(self.model).forward).parameters
        self.cache_argument = "cache" if "cache" in parameters else "past_key_values"  # until transformers 5.20 or so

    @property
    def head(self) -> Any:  # type: ignore[override]
        return self.lm_head if HEAD in self._modules else TiedHead(self.model.embed_tokens)

    # ------------------------------------------------ computing

    def hidden(self, idx: Tensor, state: Any = None, reset: Tensor | None = None) -> tuple[Tensor, CacheState | None]:
        """As in the seam; the state is None where autograd is on: training does not carry it."""
        if reset is not None:
            if state is not None:
                raise UserError(f"{self.title}: packed documents have no state to go on from")
            # transformers keeps documents apart by their positions, which begin anew
            place = torch.arange(idx.shape[1], device=idx.device).expand_as(idx)
            return self._decode(self.model, input_ids=idx, position_ids=place - place.where(reset, 0).cummax(1).values), None
        if torch.is_grad_enabled():
            with one_document_a_row():
                return self._decode(self.model, input_ids=idx), None
        from transformers.cache_utils import DynamicCache, DynamicLayer

        cache: Any = DynamicCache()
        more, valid = {}, torch.ones_like(idx, dtype=torch.bool)
        if state is not None:
            past, layers = state
            unused = 0 if past[:, 0].any() else int(past.any(0).int().argmax())  # places that no row has any more
            past = past[:, unused:]
            for keys, values in layers:
                layer = DynamicLayer()
                keys, values = (t[:, unused:].transpose(1, 2) for t in (keys, values))
                layer.lazy_initialization(keys, values)
                layer.keys, layer.values = keys, values
                cache.layers.append(layer)
            positions = past.sum(1, keepdim=True) + torch.arange(idx.shape[1], device=idx.device)
            valid = torch.cat([past, valid], 1)
            more = {"attention_mask": valid, "position_ids": positions}
        x = self._decode(self.model, cache, input_ids=idx, **more)
        return x, CacheState(valid, [(layer.keys.transpose(1, 2), layer.values.transpose(1, 2)) for layer in cache.layers])

    def _decode(self, decoder: nn.Module, cache: Any = None, **inputs) -> Tensor:
        """The decoder's output (B, T, C)."""
        grad_cp = self.execution.grad_cp
        for layer in decoder.layers:  # type: ignore[union-attr]
            layer.gradient_checkpointing = grad_cp
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        return decoder(**inputs, use_cache=cache is not None, **{self.cache_argument: cache}).last_hidden_state

    def stages(self) -> Iterator[tuple[str, nn.Module, Callable[[Any], Any]]]:
        yield f"{EMBEDDING}.", self.model.embed_tokens, lambda idx: self.model.embed_tokens(idx)
        for layer in range(len(self.model.layers)):
            yield f"model.layers.{layer}.", self.model.layers[layer], partial(self._stage, layer)
        yield "model.norm.", self.model.norm, lambda x: self.model.norm(x)
        prefix, module = (HEAD, self.lm_head) if HEAD in self._modules else (EMBEDDING, self.model.embed_tokens)
        yield f"{prefix}.", module, lambda x: self.head(x)

    def _stage(self, layer: int, x: Tensor) -> Tensor:
        return self._decode(self._layers(slice(layer, layer + 1), norm=nn.Identity()), inputs_embeds=x)

    def _layers(self, chosen: slice, **modules: nn.Module) -> nn.Module:
        """The decoder with some of its layers, which it shares, and other modules in the place of its own."""
        decoder = copy.copy(self.model)
        decoder._modules = {**self.model._modules, "layers": self.model.layers[chosen], **modules}
        decoder.config = copy.copy(decoder.config)
        if getattr(decoder.config, "layer_types", None):
            decoder.config.layer_types = decoder.config.layer_types[chosen]
        return decoder

    def shortened(self, layers: int) -> "HF":
        short = copy.copy(self)
        short._modules = {**self._modules, "model": self._layers(slice(layers))}
        return short

    @torch.no_grad()
    def initialise(self, seed: int | None = None) -> "HF":
        raise UserError(f"a new {self.title} is not made here; give --load_model FOLDER")

    # ------------------------------------------------ what parameters are

    @classmethod
    def in_part(cls, name: str, part: str) -> bool:
        components = name.split(".")[:-1]
        if part == "norm":
            return any("norm" in component for component in components)
        return part in components

    # ------------------------------------------------ for people

    def describe(self) -> str:
        config, s = self.model.config, self.sizes
        heads = f"{config.num_attention_heads} heads, {config.num_key_value_heads} of keys"
        tied = "" if HEAD in self._modules else ", tied"
        return (f"{config.model_type} of transformers, {s.n_layer} layers, hidden size {s.n_embd}, {heads}, "
                f"intermediate size {config.intermediate_size}, vocabulary {s.vocab_size}{tied}")  # fmt: skip

    # ------------------------------------------------ files

    @classmethod
    def recognises(cls, tensors: Mapping[str, Tensor]) -> bool:
        return False  # without its config.json a model cannot be told

    @classmethod
    def recognises_config(cls, config: Mapping[str, Any]) -> bool:
        return "model_type" in config

    @classmethod
    def sizes_of_config(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str) -> HFSizes:
        made = read_config(config, source)
        build(config, source)
        sizes = HFSizes(made.vocab_size, made.num_hidden_layers, made.hidden_size, dict(config))
        passed_over = {*cls.copies(sizes), *(name for name in tensors if name.endswith(CONSTANTS))}
        cls.check(sizes, {name: t for name, t in tensors.items() if name not in passed_over}, source)
        return sizes

    @classmethod
    def copies(cls, sizes: HFSizes) -> Mapping[str, str]:
        tied = read_config(sizes.config, "config.json").tie_word_embeddings
        return {f"{HEAD}.weight": f"{EMBEDDING}.weight"} if tied else {}

    @classmethod
    def new_sizes(cls, **given: int) -> Any:
        raise UserError(f"a new {cls.title} is not made here; give --load_model FOLDER")

    @classmethod
    def read_file(cls, path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
        return read_gguf(Path(path))


# ---------------------------------------------------------------- gguf


@functools.lru_cache(1)  # some seconds, and as much memory as the model: it is asked for again and again
def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, str]]:
    """Of a .gguf: its config.json, its tensors in float32 by their names in a folder, and the texts of its tokenizer's files."""
    transformers()
    try:
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
    except ImportError:
        raise UserError("a .gguf needs the package gguf; pip install 'rwkv-bone[hf]'") from None
    try:
        config = load_gguf_checkpoint(str(path))["config"]
        made = read_config(config, str(path))
        whole = transformers().AutoModelForCausalLM
        with torch.device("meta"):
            model = whole.from_config(made)
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bar
            tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
        tokenizer = transformers().AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    except UserError:
        raise
    except ImportError as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}; pip install 'rwkv-bone[hf]'") from None
    except Exception as error:  # damaged bytes can raise anything
        what = (str(error).splitlines() or [""])[0][:100]
        raise UserError(f"{path}: transformers cannot read it: {type(error).__name__}, {what}") from None
    order = [name for name in model.state_dict() if name in tensors]
    said = {"chat_template": tokenizer.chat_template, **{k: str(v) for k, v in tokenizer.special_tokens_map.items()}}
    texts = {"tokenizer.json": tokenizer.backend_tokenizer.to_str(),
             "tokenizer_config.json": json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **said}, indent=2)}  # fmt: skip
    return json.loads(made.to_json_string(use_diff=False)), {name: tensors[name] for name in order}, texts
