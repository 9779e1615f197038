"""Files: the only place that loads and saves tensors.

A model is RWKV's flat `.pth`, name -> tensor. An adapter is such a file too, with the community's names, and a sidecar `.json` of
the same name that holds all that the tensors do not say: method, options, step, and the fingerprint of the base it belongs to.
So base file + adapter file = model. Every file is written under a temporary name and renamed when it is whole.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from . import __version__
from .errors import UserError
from .models.x060 import RWKV, ModelConfig
from .peft import METHODS, AdapterLinear, attach

# ---------------------------------------------------------------- reading


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a flat `.pth`, memory-mapped (copy on write): nothing is read until it is used."""
    try:
        mappable = zipfile.is_zipfile(path)  # files of torch before 1.6 are not: those are read
        tensors = torch.load(path, map_location="cpu", mmap=mappable, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # an unpickler fed with damaged bytes can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        raise UserError(f"{path}: not a .pth of tensors, or damaged or cut short ({reason})") from None
    if not isinstance(tensors, dict) or not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path}: wanted a flat .pth, name -> tensor, and found something else")
    return {str(name): tensor.detach() for name, tensor in tensors.items()}


def open_model(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and mapped tensors of an RWKV-6 `.pth`; UserError unless it is one, whole."""
    tensors = open_tensors(path)
    config = ModelConfig.from_state_dict(tensors, str(path))
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise UserError(f"{path}: {name} is {tensor.dtype}; wanted bfloat16, float16 or float32")
    return config, tensors


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> RWKV:
    """The model of a `.pth`, strictly: each tensor goes straight from the mapped file to its place, in `dtype` if given.

    Without `dtype` on the CPU nothing is copied at all. `model.fingerprint` identifies the file's tensors.
    """
    config, tensors = open_model(path)
    with torch.device("meta"):
        model = RWKV(config)
    fingerprint_ = fingerprint(tensors)
    placed = {name: tensor.to(device=device, dtype=dtype or tensor.dtype) for name, tensor in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    model.fingerprint = fingerprint_
    return model


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """What tells one base from another: names, dtypes, shapes and 3 x 4 KiB of each tensor, hashed. Reads little."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.contiguous().view(-1).view(torch.uint8)
        for start in (0, len(data) // 2, max(0, len(data) - 4096)):
            digest.update(data[start : start + 4096].numpy().tobytes())
    return digest.hexdigest()


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes `path`'s name when it is whole and on disk; on any error `path` is as it was."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        temporary.unlink(missing_ok=True) if temporary.parent.is_dir() else None


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """A flat `.pth` from tensors at hand, for adapters and models in memory."""
    write_pth(path, {n: (t.dtype, tuple(t.shape)) for n, t in tensors.items()}, tensors.items())


class _Storage:
    """Stands in a pickle for the bytes of tensor number `key`."""

    def __init__(self, key: int, dtype: torch.dtype, numel: int):
        self.key, self.dtype, self.numel = key, dtype, numel


class _Tensor:
    """Stands in a pickle for a contiguous tensor."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape


class _Pickler(pickle.Pickler):
    """Pickles placeholders as torch.save pickles the tensors they stand for."""

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        storage_type = getattr(torch, torch.storage._dtype_to_storage_type_map()[obj.dtype])
        return "storage", storage_type, str(obj.key), "cpu", obj.numel

    def reducer_override(self, obj):
        if not isinstance(obj, _Tensor):
            return NotImplemented
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, OrderedDict())


def write_pth(
    path: str | Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a flat `.pth` as torch.save does, but tensor by tensor: only one is in memory at a time.

    `layout` gives every tensor's dtype and shape, in order; `tensors` yields (name, tensor) in that same order.
    """
    entries = {
        name: _Tensor(_Storage(key, dtype, torch.Size(shape).numel()), shape)
        for key, (name, (dtype, shape)) in enumerate(layout.items())
    }
    head = io.BytesIO()
    _Pickler(head, protocol=2).dump(entries)
    with atomic(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        record(archive, "data.pkl", head.getbuffer())
        record(archive, "byteorder", b"little")
        names = iter(layout)
        for key, (name, tensor) in enumerate(tensors):
            dtype, shape = layout[name]
            assert name == next(names) and tensor.dtype == dtype and tuple(tensor.shape) == shape, name
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
            record(archive, f"data/{key}", memoryview(data))
        assert next(names, None) is None
        record(archive, "version", b"3\n")


def record(archive: zipfile.ZipFile, name: str, data) -> None:
    """One member of a torch archive; its bytes start at a multiple of 64, as torch has it, so that they can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    header = archive.fp.tell() + 30 + len(info.filename) + 4 + 20  # local header, name, our field's head, zip64 field
    padding = -header % 64
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(data)


# ---------------------------------------------------------------- adapters


def sidecar(path: str | Path) -> Path:
    return Path(path).with_suffix(".json")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write an adapter's `.pth` and its sidecar. info: method, options, base (fingerprint and sizes), step, ..."""
    # the tensors come first: a sidecar that names other bytes than those beside it is refused on reading
    save_tensors(path, tensors)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    text = json.dumps({"rwkv_bone": __version__, "sha256": digest, **info}, indent=1)
    with atomic(sidecar(path)) as file:
        file.write(text.encode())


def read_adapter(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and its sidecar's content."""
    tensors = open_tensors(path)
    try:
        info = json.loads(sidecar(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: its sidecar {sidecar(path).name} is missing, which says what method it is") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{sidecar(path)}: cannot be read ({error})") from None
    if not isinstance(info, dict) or "method" not in info:
        raise UserError(f"{sidecar(path)}: not an adapter's sidecar (it names no method)")
    if info.get("sha256") != hashlib.sha256(Path(path).read_bytes()).hexdigest():
        raise UserError(f"{sidecar(path)}: belongs to another file than {Path(path).name}, or that one is damaged")
    return tensors, info


def load_adapter(model: RWKV, path: str | Path, force: bool = False) -> dict[str, Any]:
    """Put a saved adapter on the base model it was trained on; every tensor of the file is used. Returns the sidecar.

    The adapter and the parts of the base that were trained with it train on; the rest is frozen.
    """
    tensors, info = read_adapter(path)
    check_base(path, info, model.fingerprint, force)
    own = dict(model.named_parameters())
    method, config = method_of(info, path)
    layers = {name.rpartition(".")[0] for name in tensors if name not in own}
    odd = sorted(layers - {name.removesuffix(".weight") for name in own})
    if odd or not tensors:
        raise UserError(f"{path}: names {odd[0] + ' and' if odd else 'nothing,'} this model has no such projection")
    attach(model, method, config, sorted(layers))
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit this model ({str(error).splitlines()[-1].strip()})") from None
    lost = [name for name in missing if name.rpartition(".")[0] in layers and not name.endswith(".weight")]
    if lost or unexpected:
        raise UserError(f"{path}: {len(lost)} tensors missing, {len(unexpected)} unknown ({', '.join((lost + unexpected)[:3])})")
    for name in tensors:
        if name in own:
            model.get_parameter(name).requires_grad_(True)
    return info


def method_of(info: Mapping[str, Any], path: str | Path) -> tuple[type[AdapterLinear], AdapterLinear.Config]:
    """The method and its options that a sidecar names."""
    method = METHODS.get(info["method"])
    if method is None:
        raise UserError(f"{path}: unknown method {info['method']!r}; this program has {', '.join(METHODS)}")
    return method, method.config_from(info.get("options", {}), info["method"])


def check_base(path: str | Path, info: Mapping[str, Any], base_fingerprint: str, force: bool = False) -> None:
    base = info.get("base", {})
    if base.get("fingerprint") != base_fingerprint and not force:
        raise UserError(f"{path}: was trained on another base ({base.get('file', 'unknown')}); give that one, or --force")
