"""Files: the only place that loads and saves tensors.

A model is RWKV's flat `.pth`, name -> tensor. An adapter is such a file too, with the community's names, and one record more in
its archive, `rwkv_bone.json`: method, options, step, fingerprint of the base, all that the tensors do not say. So base file +
adapter file = model. The sidecar `.json` of the same name is that record's copy, for people and scripts to read.
Every file is written under a temporary name and renamed when it is whole.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from . import __version__
from .errors import UserError
from .foreign import UNAIDED, Foreign, translate
from .models.x060 import RWKV, ModelConfig, TimeMix
from .peft import METHODS, AdapterLinear, hf
from .peft.adapter import Weight, weight_of
from .safetensors import as_bytes, is_safetensors, open_safetensors
from .web_rwkv import from_web

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
RECORD = "rwkv_bone.json"

# ---------------------------------------------------------------- reading


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a flat `.pth`, memory-mapped (copy on write): nothing is read until it is used.

    A safetensors file does as well; web-rwkv's names and shapes become those of a `.pth`.
    """
    check_file(path)
    try:
        if is_safetensors(path):
            return from_web(open_safetensors(path)[0])
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path}: not a .pth of tensors (torch 1.6 or later), or cut short")
        tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except UserError:
        raise
    except Exception as error:  # an unpickler fed with damaged bytes can raise anything
        raise UserError(f"{path}: not a .pth of tensors, or damaged ({reason(error)})") from None
    flat = isinstance(tensors, dict) and tensors and all(isinstance(name, str) for name in tensors)
    if not flat or not all(isinstance(t, Tensor) and t.layout is torch.strided for t in tensors.values()):
        raise UserError(f"{path}: wanted a flat .pth, name -> tensor, and found something else")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def check_file(path: str | Path) -> None:
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file")


def reason(error: Exception) -> str:
    """What an exception says, in one short line."""
    text = str(error)
    if forbidden := re.search(r"Unsupported (?:global|class|operand)[^.]*?(?:GLOBAL )?([\w.]*\w)", text):
        return f"it holds {forbidden[1]}, not tensors alone"
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, pickle.UnpicklingError) else 0].strip()[:120]


def open_model(path: str | Path) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Sizes and mapped tensors of an RWKV-6 `.pth`; UserError unless it is one, whole."""
    tensors = open_tensors(path)
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {name} is {tensor.dtype}; wanted bfloat16, float16 or float32")
        if tensor.numel() == 0:
            raise UserError(f"{path}: {name} is empty, {tuple(tensor.shape)}; the file is damaged")
    config = ModelConfig.from_state_dict(tensors, str(path))
    if is_safetensors(path):  # sorted by name there, and RWKV's programs want time_maa before time_faaaa
        tensors = {name: tensors[name] for name in config.shapes()}
    return config, tensors


def load_model(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu") -> RWKV:
    """The model of a `.pth`, strictly: each tensor goes straight from the mapped file to its place, in `dtype` if given.

    Without `dtype` on the CPU nothing is copied at all. `model.fingerprint` identifies the file's tensors.
    """
    config, tensors = open_model(path)
    with torch.device("meta"):
        model = RWKV(config)
    fingerprint_ = fingerprint(tensors)
    placed = {name: t.to(device=device, dtype=dtype or t.dtype).contiguous() for name, t in tensors.items()}
    model.load_state_dict(placed, strict=True, assign=True)
    model.fingerprint, model.file_dtype = fingerprint_, tensors["emb.weight"].dtype
    return model


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


class Streamed(Mapping[str, Tensor]):
    """A file's tensors for reading each of them once, in little memory.

    Mapped pages count as memory in use once they are read, so the mapping is renewed after every `budget` bytes, or as many as
    the largest tensor has. A tensor that was handed out keeps the mapping that it came from. `.tensors` are for looking at
    dtypes and shapes.
    """

    def __init__(self, open_: Callable[[], dict[str, Tensor]], budget: int = 32 << 20):
        self.open, self.read = open_, 0
        self.tensors = open_()
        self.budget = max(budget, *(tensor.nbytes for tensor in self.tensors.values()))

    def __getitem__(self, name: str) -> Tensor:
        size = self.tensors[name].nbytes
        if self.read + size > self.budget:
            self.renew()
        self.read += size
        return self.tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def renew(self) -> None:
        self.tensors, self.read = {}, 0  # the old mapping goes before the new one comes
        self.tensors = self.open()


# ---------------------------------------------------------------- writing


@contextlib.contextmanager
def atomic(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write that takes `path`'s name when it is whole and on disk; on any error `path` is as it was.

    If the process is killed, `NAME.PID.tmp` remains beside it. Where `path` is a link, the file it leads to is replaced.
    """
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists() and not target.is_file():
            raise OSError("not a file")
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape, in the file's order


def layout_of(tensors: Mapping[str, Tensor]) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """A flat `.pth` from tensors at hand, for models in memory."""
    write_pth(path, layout_of(tensors), tensors.items())


def write_pth(
    path: str | Path, layout: Layout, tensors: Iterable[tuple[str, Tensor]], records: Mapping[str, bytes] | None = None
) -> None:
    """Write a flat `.pth` as torch.save does, but tensor by tensor: only one is in memory at a time.

    `tensors` yields (name, tensor) in the order of `layout`. `records` are further members of the archive, which torch.load
    passes over. The same input gives the same bytes.
    """
    entries = {
        name: _Tensor(_Storage(key, dtype, torch.Size(shape).numel()), shape)
        for key, (name, (dtype, shape)) in enumerate(layout.items())
    }
    head = io.BytesIO()
    _Pickler(head, protocol=2).dump(entries)
    with atomic(path) as file:
        archive = zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True)
        try:
            record(archive, "data.pkl", head.getbuffer())
            record(archive, "byteorder", b"little")
            names = iter(layout)
            for key, (name, tensor) in enumerate(tensors):
                assert name == next(names) and (tensor.dtype, tuple(tensor.shape)) == layout[name], name
                record(archive, f"data/{key}", as_bytes(tensor))
            assert next(names, None) is None
            record(archive, "version", b"3\n")
            for name, data in (records or {}).items():
                record(archive, name, data)
            archive.close()
        finally:
            archive.fp = None  # after an error there is nothing to finish, and trying to would hide the error


def record(archive: zipfile.ZipFile, name: str, data) -> None:
    """One member of a torch archive; its bytes start at a multiple of 64, as torch has it, so that they can be mapped."""
    info = zipfile.ZipInfo(f"archive/{name}")
    assert archive.fp is not None  # open for writing
    header = archive.fp.tell() + 30 + len(info.filename) + 4 + 20  # local header, name, our field's head, zip64 field
    padding = -header % 64
    info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
    with archive.open(info, "w", force_zip64=True) as member:
        member.write(data)


class _Storage:
    """Stands in a pickle for the bytes of tensor number `key`."""

    def __init__(self, key: int, dtype: torch.dtype, numel: int):
        self.key, self.dtype, self.numel = key, dtype, numel


class _Tensor:
    """Stands in a pickle for a contiguous tensor."""

    def __init__(self, storage: _Storage, shape: tuple[int, ...]):
        self.storage, self.shape = storage, shape


STORAGES = {
    torch.bfloat16: torch.BFloat16Storage,
    torch.float16: torch.HalfStorage,
    torch.float32: torch.FloatStorage,
    torch.float64: torch.DoubleStorage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


class _Pickler(pickle.Pickler):
    """Pickles placeholders as torch.save pickles the tensors they stand for."""

    def persistent_id(self, obj):
        if not isinstance(obj, _Storage):
            return None
        return "storage", STORAGES[obj.dtype], str(obj.key), "cpu", obj.numel

    def reducer_override(self, obj):
        if not isinstance(obj, _Tensor):
            return NotImplemented
        stride = torch.empty(obj.shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (obj.storage, 0, obj.shape, stride, False, OrderedDict())


# ---------------------------------------------------------------- adapters


def sidecar(path: str | Path) -> Path:
    return Path(path).with_suffix(".json")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> None:
    """Write an adapter's `.pth` with what it says about itself, and the sidecar.

    info: method, options, base (file, fingerprint, sizes), step, ... The options are completed with the method's defaults.
    """
    info = dict(info)
    if info["method"] in METHODS:
        info["options"] = vars(method_of(info, path)[1])
    text = json.dumps({"rwkv_bone": __version__, **info}, indent=1).encode()
    # The .pth alone decides: it is one file, written at once, and a sidecar that is older or missing changes nothing.
    write_pth(path, layout_of(tensors), tensors.items(), {RECORD: text})
    with atomic(sidecar(path)) as file:
        file.write(text)


def read_info(path: str | Path) -> dict[str, Any] | None:
    """What an adapter says about itself, checked for its types; None if the file is another program's."""
    check_sums(path)
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.rpartition("/")[2] == RECORD]
        text = archive.read(names[0]) if names else None
    if text is None:
        return None
    try:
        info = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: its record {RECORD} is not JSON") from None
    wanted = {"method": str, "options": dict, "base": dict}
    if not isinstance(info, dict) or not all(isinstance(info.get(key), kind) for key, kind in wanted.items()):
        raise UserError(f"{path}: its record {RECORD} lacks method, options or base, or they are of another type")
    return info


def check_sums(path: str | Path) -> None:
    """Read an archive through; UserError unless every member's checksum holds."""
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # as for torch.load: damaged bytes can raise anything
        raise UserError(f"{path}: damaged or cut short ({reason(error)})") from None
    if damaged is not None:
        raise UserError(f"{path}: damaged: {damaged} does not have its checksum")


class Adapter:
    """An adapter's file, opened and checked against the sizes of the model it is for. Its tensors are read as they are used.

    `layers`: projection -> keys of its adapter's tensors. `parts`: tensors of the base that were trained in full beside it.
    """

    def __init__(self, path: str | Path, sizes: ModelConfig, foreign: Foreign = UNAIDED):
        tensors, self.info = read_adapter(path, foreign)
        self.path = Path(path)
        self.method, self.config = method_of(self.info, path)
        shapes = replace(sizes, time_state=True).shapes()
        self.parts = [name for name in tensors if name in shapes]
        if self.method is None and "blocks.0.att.key.weight" in self.parts:
            raise UserError(f"{path}: is a whole model, not an adapter: use it as it is, or as the base")
        of_base, here = self.info["base"].get("sizes"), {**asdict(sizes), "time_state": None}
        if isinstance(of_base, dict) and {**here, **of_base, "time_state": None} != here:
            raise self.of_another_base("give that one")  # by --force neither
        self.layers: dict[str, list[str]] = {}
        for name in tensors:
            if name not in shapes:
                layer, _, key = name.rpartition(".")
                self.layers.setdefault(layer, []).append(key)
        self.check(tensors, shapes)
        own = "foreign" not in self.info
        self.tensors = Streamed(lambda: open_tensors(path) if own else open_foreign(path, foreign)[0])

    def check(self, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Every tensor must find its place in the model, and have the shape that is wanted there."""
        odd = [layer for layer in self.layers if self.method is None or not is_projection(shapes.get(f"{layer}.weight"), layer)]
        if odd:
            names = [name for name in tensors if name.rpartition(".")[0] in odd]
            raise UserError(f"{self.path}: {len(names)} tensors that this model has no place for ({', '.join(names[:3])})")
        wanted = {name: shapes[name] for name in self.parts}
        for layer in self.layers:
            wanted |= {f"{layer}.{key}": shape for key, shape in self.shapes_at(shapes[f"{layer}.weight"]).items()}
        states = [name for name in shapes if name.endswith(".time_state")]
        if any(name in wanted for name in states):
            wanted |= {name: shapes[name] for name in states}  # all layers' or none
        if missing := [name for name in wanted if name not in tensors]:
            raise UserError(f"{self.path}: lacks {len(missing)} of its tensors ({', '.join(missing[:3])})")
        for name, tensor in tensors.items():
            if name not in wanted:
                raise UserError(f"{self.path}: {name} is no tensor of the method {self.info['method']}")
            if tuple(tensor.shape) != wanted[name] or tensor.dtype not in FLOATS:
                came, options = f"{tensor.dtype} {tuple(tensor.shape)}", f" and {self.config}" if self.config else ""
                raise UserError(f"{self.path}: {name} is {came}; for this model{options} it must be {wanted[name]}")

    def shapes_at(self, weight: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """The adapter's tensors on a projection of that shape."""
        assert self.method and self.config
        try:
            with torch.device("meta"):
                layer = self.method(torch.empty(weight), self.config)
        except UserError as error:
            raise UserError(f"{self.path}: {error}") from None
        except (RuntimeError, TypeError, OverflowError):  # a size beyond all measure
            raise UserError(f"{self.path}: {self.config} cannot be put on a projection of {weight}") from None
        return {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items() if key != "weight"}

    def check_base(self, fingerprint: str, force: bool = False) -> None:
        """The base must be the one that was trained on. Other programs' files do not say which that was."""
        if "foreign" not in self.info and self.info["base"].get("fingerprint") != fingerprint and not force:
            raise self.of_another_base("give that one (or merge.py --force)")

    def of_another_base(self, cure: str) -> UserError:
        known = self.info["base"].get("file") or "one without a name"
        return UserError(f"{self.path}: was trained on another base ({known}); {cure}")

    def changes(self, name: str) -> bool:
        """Whether the base's tensor of that name is another after merging."""
        return name in self.parts or name.removesuffix(".weight") in self.layers

    def layer(self, name: str, weight: Weight) -> AdapterLinear:
        """The adapter on one projection, whose base weight is given."""
        assert self.method and self.config
        if f"{name}.weight" in self.parts:
            weight = self.tensors[f"{name}.weight"].to(weight.device)
        layer = self.method(weight, self.config)
        layer.load_state_dict({key: self.tensors[f"{name}.{key}"] for key in self.layers[name]}, strict=False)
        return layer

    @torch.no_grad()
    def merged(self, name: str, weight: Tensor) -> Tensor:
        """What becomes of the base's tensor, in float32 or more where an adapter is on it: not rounded yet."""
        if name.removesuffix(".weight") in self.layers:
            return self.layer(name.removesuffix(".weight"), weight).merged_weight()
        return self.tensors[name].to(weight.device) if name in self.parts else weight


def is_projection(shape: tuple[int, ...] | None, name: str) -> bool:
    return shape is not None and len(shape) == 2 and name != "emb"


def read_adapter(path: str | Path, foreign: Foreign = UNAIDED) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An adapter's tensors and what it says about itself.

    Other programs' are translated: folders of peft, and RWKV-PEFT's files, as far as `foreign` tells enough of them.
    """
    if hf.is_folder(path):
        return hf.read_folder(path)
    info = read_info(path)
    return (open_tensors(path), info) if info is not None else open_foreign(path, foreign)


def open_foreign(path: str | Path, foreign: Foreign) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if hf.is_folder(path):
        return hf.read_folder(path)
    return translate(path, open_tensors(path), foreign.lora_alpha, open_tensors(foreign.init) if foreign.init else None)


def load_adapter(model: RWKV, path: str | Path, force: bool = False, foreign: Foreign = UNAIDED) -> dict[str, Any]:
    """Put a saved adapter on the base model it was trained on; every tensor of the file is used. Returns what it says of itself.

    The adapter and the parts of the base that were trained with it train on; the rest is frozen.
    """
    adapter = Adapter(path, model.config, foreign)
    adapter.check_base(model.fingerprint, force)
    if any(name.endswith(".time_state") for name in adapter.parts) and not model.config.time_state:
        add_time_state(model)
    model.requires_grad_(False)
    for name in adapter.layers:
        model.set_submodule(name, adapter.layer(name, weight_of(model, name)))
    for name in adapter.parts:
        parameter = model.get_parameter(name)
        parameter.data.copy_(adapter.tensors[name])
        parameter.requires_grad_(True)
    return adapter.info


def add_time_state(model: RWKV) -> None:
    """Give every layer an initial state of zeros, as state tuning trains it."""
    model.config = replace(model.config, time_state=True)
    for module in model.modules():
        if isinstance(module, TimeMix):
            H, N = module.time_faaaa.shape
            module.time_state = nn.Parameter(module.time_faaaa.new_zeros(H, N, N))


def method_of(info: Mapping[str, Any], path: str | Path) -> tuple[type[AdapterLinear] | None, AdapterLinear.Config | None]:
    """The method and its options that an adapter names; None for `none`: parts of the base alone."""
    if info["method"] == "none":
        return None, None
    method = METHODS.get(info["method"])
    if method is None:
        raise UserError(f"{path}: unknown method {info['method']!r}; this program has {', '.join(METHODS)}")
    try:
        return method, method.config_from(info["options"], info["method"])
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---------------------------------------------------------------- training state


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write what a run needs to go on (nested dicts and lists of tensors and plain values)."""
    with atomic(path) as file:
        torch.save(dict(state), file)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote; UserError if it is damaged."""
    check_sums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with damaged bytes can raise anything
        raise UserError(f"{path}: not a whole checkpoint ({reason(error)})") from None
