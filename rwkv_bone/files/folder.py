"""A model as a folder, as Hugging Face has it: config.json, tensors in one or several safetensors files, the tokenizer's files.

A file of another kind that a model of the registry reads by itself (`LanguageModel.read_file`) is taken for such a folder too.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.base import OwnText
from .atomic import atomic
from .pth import Layout
from .safetensors import open_safetensors, write_safetensors

CONFIG, ONE_SHARD, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".h5", ".msgpack", ".onnx", ".ckpt")  # not copied beside merged ones


@dataclass(frozen=True)
class Folder:
    config: dict[str, Any]
    tensors: dict[str, Tensor]  # mapped, in the order of the shards
    shards: dict[str, list[str]]  # file -> its tensors, in its order
    others: Mapping[str, Path | str]  # the other files: where they lie, or their text


def is_folder(path: str | Path) -> bool:
    return os.path.isfile(Path(path) / CONFIG)


def open_folder(path: str | Path) -> Folder:
    """UserError unless every shard is there and whole, and the index names what they hold."""
    path = Path(path)
    config = read_json(path / CONFIG)
    if os.path.isfile(path / INDEX):
        placed = read_json(path / INDEX).get("weight_map")
        if not isinstance(placed, dict) or not all(isinstance(file, str) and Path(file).name == file for file in placed.values()):
            raise UserError(f"{path / INDEX}: its weight_map does not say which file holds which tensor")
        files = sorted(set(placed.values()))
    else:
        placed, files = None, [ONE_SHARD]
    tensors: dict[str, Tensor] = {}
    shards = {}
    for file in files:
        if placed is None and not os.path.isfile(path / file):
            raise UserError(f"{path}: holds {CONFIG}, and neither {ONE_SHARD} nor {INDEX}; give a folder with safetensors")
        found = open_safetensors(path / file)[0]
        if placed is not None and (odd := [name for name in found if placed.get(name) != file]):
            raise UserError(f"{path / file}: holds {odd[0]}, which {INDEX} places elsewhere")
        tensors |= found
        shards[file] = list(found)
    if placed is not None and (missing := [name for name in placed if name not in tensors]):
        raise UserError(f"{path / placed[missing[0]]}: lacks {missing[0]}, which {INDEX} places there ({len(missing)} such)")
    others = {entry.name: entry for entry in sorted(path.iterdir())
              if entry.is_file() and not entry.name.startswith(".") and entry.suffix not in WEIGHTS}  # fmt: skip
    return Folder(config, tensors, shards, others)


def read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: is no JSON object")
    return found


def as_folder(config: dict[str, Any], tensors: dict[str, Tensor], texts: Mapping[str, str]) -> Folder:
    """What a model read from a file of its own would be as a folder of one shard."""
    others: dict[str, Path | str] = {CONFIG: json.dumps(config, indent=2) + "\n", **texts}
    return Folder(config, tensors, {ONE_SHARD: list(tensors)}, others)


# ---------------------------------------------------------------- text


def own_text(folder: Folder) -> OwnText | None:
    """The tokenizer and the chat template of a folder; None where it has no tokenizer.json."""

    def parsed(name: str) -> dict[str, Any]:
        there = folder.others.get(name)
        found = read_json(there) if isinstance(there, Path) else json.loads(there or "{}")
        return found

    tokenizer = folder.others.get("tokenizer.json")
    if tokenizer is None:
        return None
    said = parsed("special_tokens_map.json") | parsed("tokenizer_config.json")
    tokens = {name: t["content"] if isinstance(t, dict) else t for name, t in said.items() if name.endswith("_token")}
    tokens = {name: t for name, t in tokens.items() if isinstance(t, str)}
    template = said.get("chat_template") or ""
    if isinstance(template, list):  # several, by name
        template = next((t["template"] for t in template if t.get("name") == "default"), "")
    if isinstance(beside := folder.others.get("chat_template.jinja"), Path):
        template = beside.read_text(encoding="utf-8")
    ends = parsed("generation_config.json").get("eos_token_id", folder.config.get("eos_token_id"))
    ends = [ends] if isinstance(ends, int) else ends or []
    return OwnText(str(tokenizer), template, tokens, tuple(ends))


# ---------------------------------------------------------------- writing


def write_folder(path: Path, source: Folder, layout: Layout, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Write tensors as the shards that `source` has, and its other files beside them. tensors: in the order of `layout`.

    All is written in a folder beside `path`, which takes its name when it is whole; or, where `path` is there, its files theirs.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    stream = iter(tensors)
    try:
        temporary.mkdir(parents=True)
        for file, names in source.shards.items():
            with atomic(temporary / file) as out:
                write_safetensors(out, {name: layout[name] for name in names}, islice(stream, len(names)))
        if next(stream, None) is not None:
            raise AssertionError("more tensors than the shards hold")
        for name, content in source.others.items():
            match content:
                case Path():
                    shutil.copyfile(content, temporary / name)
                case str():
                    (temporary / name).write_text(content, encoding="utf-8")
        rewrite(temporary, source, layout)
        if not path.exists():
            os.rename(temporary, path)
            return
        for entry in sorted(temporary.iterdir()):
            os.replace(entry, path / entry.name)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rewrite(folder: Path, source: Folder, layout: Layout) -> None:
    """Let config.json and the index say what dtype and size the written tensors have."""
    dtypes = {dtype for dtype, _ in layout.values()}
    if dtypes != {tensor.dtype for tensor in source.tensors.values()} and len(dtypes) == 1:
        config = {name: value for name, value in source.config.items() if name != "torch_dtype"}
        config["dtype"] = str(dtypes.pop()).removeprefix("torch.")
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if (folder / INDEX).exists():
            index = read_json(folder / INDEX)
            size = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
            index["metadata"] = {**index.get("metadata", {}), "total_size": size}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
