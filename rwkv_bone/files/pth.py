"""RWKV's flat `.pth`, name -> tensor: read by memory map, read in little memory, written tensor by tensor."""

import contextlib
import ctypes
import io
import mmap
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UserError
from .atomic import atomic
from .safetensors import as_bytes, is_safetensors, open_safetensors

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

Layout = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape, in the file's order


def open_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a flat `.pth`, memory-mapped (copy on write): nothing is read until it is used.

    A safetensors file does as well.
    """
    check_file(path)
    try:
        if is_safetensors(path):
            return open_safetensors(path)[0]
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
        raise UserError(f"{path}: wanted a flat .pth, name -> tensor, and found {what_it_holds(tensors)}")
    return {name: tensor.detach() for name, tensor in tensors.items()}


def what_it_holds(loaded: object) -> str:
    """What a file that is no flat .pth holds, in words."""
    keys = {str(key) for key in loaded} if isinstance(loaded, dict) else set()
    if keys & {"param_groups", "optimizer", "optimizer_states", "optimizer_state_dict", "base_optimizer_state"}:
        return "an optimiser's checkpoint"
    if nested := keys & {"state_dict", "model_state_dict", "module", "model"}:
        return f"a training checkpoint whose tensors lie under {min(nested)!r}"
    if isinstance(loaded, list | tuple):
        return "a list: a state of an inference program?" if all(isinstance(t, Tensor) for t in loaded) else "a list"
    return "a single tensor" if isinstance(loaded, Tensor) else "something else"


def check_file(path: str | Path) -> None:
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file")
    if not os.path.isfile(path):
        raise UserError(f"{path}: not a file")


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


def reason(error: Exception) -> str:
    """What an exception says, in one short line."""
    text = str(error)
    if forbidden := re.search(r"Unsupported (?:global|class|operand)[^.]*?(?:GLOBAL )?([\w.]*\w)", text):
        return f"it holds {forbidden[1]}, not tensors alone"
    lines = text.strip().splitlines() or [type(error).__name__]
    return lines[-1 if isinstance(error, pickle.UnpicklingError) else 0].strip()[:120]


class Streamed(Mapping[str, Tensor]):
    """A file's tensors for reading each of them once, in little memory; nothing may be written into them.

    Mapped pages count as memory in use once they are read, so they are given back after every `budget` bytes, or as many as the
    largest tensor has. Tensors that were handed out stay valid: their pages are read again where they are used again. Tensors
    that are no mapping of a file (converted ones, or where the system is not Linux) are opened anew instead. `.tensors` are for
    looking at dtypes and shapes.
    """

    def __init__(self, open_: Callable[[], dict[str, Tensor]], budget: int = 32 << 20):
        self.open, self.read = open_, 0
        self.tensors = open_()
        self.budget = max([budget, *(tensor.nbytes for tensor in self.tensors.values())])

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
        self.read = 0
        if not give_back(self.tensors.values()):
            self.tensors = {}  # the old ones go before the new ones come
            self.tensors = self.open()


def give_back(tensors: Iterable[Tensor]) -> bool:
    """Drop the mapped pages of tensors from memory until they are read again; False, and nothing done, unless all are of files.

    To any other memory this would be fatal: it would be zeros afterwards. So the system is asked what is a file's.
    """
    try:
        with open("/proc/self/maps") as file:  # address range, permissions, offset, device, inode (0: no file), path
            fields = [line.split(None, 5) for line in file]
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    files = [tuple(int(end, 16) for end in f[0].split("-")) for f in fields if f[1].startswith("r") and f[4] != "0"]
    ranges = set()
    for tensor in tensors:
        begin = tensor.untyped_storage().data_ptr()
        end = begin + tensor.untyped_storage().nbytes()
        whole = [(first, last) for first, last in files if first <= begin and end <= last]
        if not whole:
            return False
        ranges.add(whole[0])
    return all(
        madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED) == 0 for first, last in ranges
    )


def trim() -> None:
    """Give memory that was freed back to the system. glibc keeps what is no larger than the largest piece freed so far, and finds
    no use for much of it: tensors are aligned, and small objects lie between them."""
    with contextlib.suppress(OSError, AttributeError):  # another system's C library
        ctypes.CDLL(None).malloc_trim(0)


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
