"""Base models: opened strictly, placed on their device, told apart by a fingerprint."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import __version__
from ..errors import UserError
from ..interop.web_rwkv import from_web
from ..models import MODELS, USUAL, Execution, LanguageModel, recognise
from .folder import Folder, as_folder, is_folder, open_folder, own_text
from .pth import FLOATS, check_file, open_tensors
from .safetensors import is_safetensors, open_safetensors

ABOUT = "rwkv_bone_model.json"  # a record in a model's .pth, which torch.load passes over; an entry of a safetensors' metadata


class Opened(NamedTuple):
    """A model's file or folder, checked and not read yet. The tensors are mapped and have the file's names, in its order."""

    kind: type[LanguageModel]
    sizes: Any
    tensors: dict[str, Tensor]
    folder: Folder | None = None  # where it is one

    def parameters(self) -> dict[str, Tensor]:
        """The tensors by the model's names of its parameters."""
        return by_parameter(self.kind, self.sizes, self.tensors)


def by_parameter(kind: type[LanguageModel], sizes: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors by the model's names of its parameters, without copies. Constants that it holds keep their names."""
    copies = kind.copies(sizes)
    return {kind.parameter_name(name): tensor for name, tensor in tensors.items() if name not in copies}


def open_model(path: str | Path) -> Opened:
    """The model in a file or a folder; UserError unless it is one of those in the registry, whole."""
    folder = folder_of(path)
    tensors = file_tensors(path) if folder is None else folder.tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {name} is {tensor.dtype}; wanted bfloat16, float16 or float32")
        if tensor.numel() == 0:
            raise UserError(f"{path}: {name} is empty, {tuple(tensor.shape)}; the file is damaged")
        if tensor.is_meta:
            raise UserError(f"{path}: {name} has a shape and no values (device meta); save the model again with its weights")
    kind = recognise(tensors, str(path), None if folder is None else folder.config)
    named = {kind.parameter_name(name): tensor for name, tensor in tensors.items()}
    if folder is not None:
        return Opened(kind, kind.sizes_of_config(folder.config, named, str(path)), tensors, folder)
    sizes = kind.sizes_of(named, str(path))
    if is_safetensors(path):  # sorted by name there; other programs want the order of a .pth
        theirs = {kind.parameter_name(name): name for name in tensors}
        tensors = {theirs[name]: named[name] for name in kind.shapes(sizes)}
    return Opened(kind, sizes, tensors)


def reads_as_folder(path: str | Path) -> bool:
    return os.path.isdir(path) or any(Path(path).suffix in kind.suffixes for kind in MODELS.values())


def folder_of(path: str | Path) -> Folder | None:
    """A model's folder, or a file that a model of the registry reads as one; None for a flat file of tensors."""
    if is_folder(path):
        return open_folder(path)
    if os.path.isdir(path):
        raise UserError(f"{path}: not a file, and no folder of Hugging Face transformers: it has no config.json")
    for kind in MODELS.values():
        if Path(path).suffix in kind.suffixes:
            check_file(path)
            return as_folder(*kind.read_file(path))
    return None


def file_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a file or a folder, mapped, with web-rwkv's names and layout undone."""
    if (folder := folder_of(path)) is not None:
        return folder.tensors
    tensors = open_tensors(path)
    return from_web(tensors, MODELS.values()) if is_safetensors(path) else tensors


def load_model(
    path: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    execution: Execution = USUAL,
) -> LanguageModel:
    """The model of a file, strictly: each tensor goes straight from the mapped file to its place, in `dtype` if given.

    Without `dtype` on the CPU nothing is copied at all. `model.fingerprint` identifies the file's tensors.
    """
    opened = open_model(path)
    with torch.device("meta"):
        model = opened.kind(opened.sizes, execution)
    model.file, model.fingerprint = os.fspath(path), fingerprint(opened.tensors)
    model.file_dtype = next(iter(opened.tensors.values())).dtype
    own, there = model.state_dict(), opened.parameters()
    placed = {name: there[name].to(device=device, dtype=dtype or there[name].dtype).contiguous() for name in own}
    model.load_state_dict(placed, strict=True, assign=True)
    if opened.folder is not None:
        model.text = own_text(opened.folder)
    return model.to(device)  # what no file holds: a model's constants


def read_about(path: str | Path) -> dict[str, Any]:
    """What a model's file that we wrote says of itself: the `tokenizer` and `template` of its training. {} for others' files."""
    try:
        if os.path.isfile(path) and is_safetensors(path):
            text: str | bytes = open_safetensors(path)[1].get(ABOUT, "{}")
        else:
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.rpartition("/")[2] == ABOUT]
                text = archive.read(names[0]) if names else "{}"
        about = json.loads(text)
    except (OSError, ValueError, RecursionError, AttributeError, TypeError, zipfile.BadZipFile):
        return {}
    return about if isinstance(about, dict) else {}


def about_record(info: Mapping[str, Any]) -> dict[str, bytes]:
    """The record that `read_about` reads, by its name, of what an adapter or a model says of itself."""
    about = {key: info[key] for key in ("tokenizer", "template") if key in info}
    return {ABOUT: json.dumps({"rwkv_bone": __version__, **about}, indent=1).encode()} if about else {}


def identity(path: str | Path, model: LanguageModel) -> dict[str, Any]:
    """What an adapter's record says of its base, which was read from `path`."""
    sizes = asdict(model.sizes)
    return {"file": Path(path).name, "fingerprint": model.fingerprint, "version": model.version, "sizes": sizes}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells one base from another: names, dtypes, shapes and 3 x 4 KiB of each tensor, hashed. Reads little."""
    return combine(sample(name, tensor) for name, tensor in tensors.items())


def sample(name: str, tensor: Tensor) -> str:
    """One tensor's share of the fingerprint."""
    data = tensor.contiguous().view(-1).view(torch.uint8)
    digest = hashlib.sha256()
    for start in (0, len(data) // 2, max(0, len(data) - 4096)):
        digest.update(data[start : start + 4096].numpy().tobytes())
    return f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest.hexdigest()}"


def combine(samples: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(sorted(samples)).encode()).hexdigest()
