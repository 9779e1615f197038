"""GGUF, the format of llama.cpp, Ollama and LM Studio, as llama.cpp's own converter writes it.

How a tensor is called there and made of a model's parameters, the model states (`gguf_tensors`). Here are the types of the
tensors, the metadata and the vocabulary; the `gguf` package writes them, one tensor in memory at a time.
"""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..files.atomic import atomic
from ..models.base import GGUFTensor, LanguageModel

TYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}  # of most matrices
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "Q8_0": torch.float32}  # in which each comes
FLOAT32 = ("time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused")
BLOCK = 32  # numbers of a row that share a scale in Q8_0

BLANK_LINE = b"\n\n"
CHAT_TEMPLATE = """\
{#- rwkv-world: by this word llama.cpp knows the template without jinja -#}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- 'System: ' -}}
{%- elif message['role'] == 'user' -%}{{- 'User: ' -}}
{%- else -%}{{- 'Assistant: ' -}}
{%- endif -%}
{{- message['content'] | trim + '\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}"""


def package() -> ModuleType:
    try:
        import gguf
    except ImportError:
        raise UserError("--format gguf needs the gguf package: pip install gguf") from None
    return gguf


def chat_template(trained_with: Any) -> str:
    """The template of a record, without what llama.cpp does not know, if it is the user's own and can ask; or RWKV's."""
    source = trained_with.get("source") if isinstance(trained_with, dict) else None
    if not isinstance(source, str) or "add_generation_prompt" not in source:
        return CHAT_TEMPLATE
    source = re.sub(r"\{%([-+]?)\s*(?:end)?generation\s*([-+]?)%\}", r"{#\1 \2#}", source)
    return re.sub(r"\|\s*no_blank_lines\b", "| trim", source)


class Plan:
    """The tensors of a model's GGUF file: `tensors` there, each with its shape and type, and `dtypes` in which parameters come.

    type: one of `TYPES`. As in llama.cpp's converter, vectors and some small matrices are float32 in every file, and a matrix
    whose rows Q8_0 cannot cut into blocks is float16. vocabulary: the bytes of each token from 1 on, None where an id has none;
    token 0 begins and ends documents. template: of the training, as a record has it (`Template.identity`). UserError, naming
    `source`, for a model that llama.cpp does not have.
    """

    def __init__(
        self,
        kind: type[LanguageModel],
        sizes: Any,
        type: str,
        vocabulary: Sequence[bytes | None],
        source: str,
        template: Any = None,
    ):
        if not kind.gguf_architecture:
            raise UserError(f"{source}: llama.cpp has no {kind.title} that could be written as GGUF; write a .pth")
        self.kind, self.type, self.vocabulary = kind, type, vocabulary
        self.chat_template = chat_template(template)
        self.metadata = kind.gguf_metadata(sizes, source)
        self.shapes = kind.shapes(sizes)
        self.tensors: list[tuple[GGUFTensor, tuple[int, ...], str]] = []
        self.dtypes: dict[str, torch.dtype] = {}
        for tensor in kind.gguf_tensors(sizes):
            shape = tuple(tensor.make(*(torch.empty(self.shapes[name], device="meta") for name in tensor.parameters)).shape)
            found = self.type_of(tensor.name, shape)
            self.tensors.append((tensor, shape, found))
            self.dtypes |= dict.fromkeys(tensor.parameters, DTYPES[found])

    def type_of(self, name: str, shape: Sequence[int]) -> str:
        if len(shape) < 2 or name.split(".")[-2] in FLOAT32:
            return "F32"
        return "F16" if TYPES[self.type] == "Q8_0" and shape[-1] % BLOCK else TYPES[self.type]

    @property
    def types(self) -> set[str]:
        return {type for _, _, type in self.tensors}

    def ordered(self, names: Iterable[str]) -> list[tuple[GGUFTensor, tuple[int, ...], str]]:
        """The tensors in the order in which they can be written where parameters come in that order."""
        place = {name: i for i, name in enumerate(names)}
        return sorted(self.tensors, key=lambda entry: max(place[name] for name in entry[0].parameters))


def made(tensors: Iterable[GGUFTensor], parameters: Iterable[tuple[str, Tensor]]) -> Iterator[Tensor]:
    """Each tensor once its parameters have come, which are kept until the last tensor that is made of them."""
    coming = iter(parameters)
    kept: dict[str, Tensor] = {}
    last = {name: tensor.name for tensor in tensors for name in tensor.parameters}
    for tensor in tensors:
        while not all(name in kept for name in tensor.parameters):
            name, value = next(coming)
            if name in last:
                kept[name] = value
        yield tensor.make(*(kept[name] for name in tensor.parameters)).contiguous()
        for name in tensor.parameters:
            if last[name] == tensor.name:
                del kept[name]
    for _ in coming:
        pass


def write_gguf(path: str | Path, plan: Plan, order: Iterable[str], parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Write a model's file; it appears when it is whole. parameters: (name, tensor) in `plan.dtypes`, the names in `order`."""
    gguf = package()
    entries = plan.ordered(order)
    writer = gguf.GGUFWriter(None, plan.kind.gguf_architecture)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(Path(path).stem)
    writer.add_size_label(gguf.size_label(sum(map(math.prod, plan.shapes.values())), 0, 0, 0))
    for name, value in plan.metadata.items():
        add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        add(f"{plan.kind.gguf_architecture}.{name}", value)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if plan.type == "fp32" else f"MOSTLY_{TYPES[plan.type]}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_vocabulary(gguf, writer, plan)
    for entry, shape, kind in entries:
        type = gguf.GGMLQuantizationType[kind]
        block, size = gguf.GGML_QUANT_SIZES[type]
        writer.add_tensor_info(entry.name, shape, np.dtype(np.float32), math.prod(shape) // block * size, type)
    with atomic(path) as file:
        try:
            writer.write_header_to_file(Path(file.name))
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for (_, _, kind), tensor in zip(entries, made([entry[0] for entry in entries], parameters)):
                if kind == "Q8_0":
                    data = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
                else:
                    data = tensor.view(-1).view(torch.uint8).numpy()
                writer.write_tensor_data(data)
        finally:
            writer.close()


def add_vocabulary(gguf: ModuleType, writer: Any, plan: Plan) -> None:
    """Tokens as Python writes bytes, which is how llama.cpp reads RWKV's vocabulary, and what ends an answer."""
    tokens, types = ["<s>"], [gguf.TokenType.CONTROL]
    for token, entry in enumerate(plan.vocabulary, 1):
        tokens.append(f"[PAD{token}]" if entry is None else repr(entry)[2:-1])
        types.append(gguf.TokenType.UNUSED if entry is None else gguf.TokenType.NORMAL)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    if plan.kind.template == "world" and BLANK_LINE in plan.vocabulary:
        writer.add_eot_token_id(plan.vocabulary.index(BLANK_LINE) + 1)  # G1's answers may hold blank lines, World's end at one
    writer.add_chat_template(plan.chat_template)
