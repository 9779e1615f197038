"""The safetensors format: 8 bytes of length (little endian), a JSON header of that length, then the tensors' bytes.

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"key": "value"}}
"""

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from ..errors import UserError

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # as the format's own library has it


def is_safetensors(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def open_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, memory-mapped (copy on write), and its metadata. UserError unless it is whole."""
    try:
        size = os.path.getsize(path)
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(LONGEST_HEADER, size - 8):
                raise ValueError("its header's length does not fit the file")
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        metadata = header.pop("__metadata__", {})
        if not header:
            raise ValueError("it holds no tensor")
        mapped = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)[8 + length :]
        return {name: view(mapped, name, entry) for name, entry in header.items()}, metadata
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a safetensors file, or damaged or cut short ({str(error).splitlines()[0][:120]})") from None


def view(data: Tensor, name: str, entry: Mapping) -> Tensor:
    """One tensor of the mapped bytes; ValueError unless its entry is sound."""
    try:
        dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the entry of {name} is no dtype, shape and offsets") from None
    numbers = [*shape, begin, end] if isinstance(shape, list) else [None]
    if not all(type(n) is int and 0 <= n <= len(data) for n in numbers) or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the shape and the offsets of {name} do not fit the file")
    part = data[begin:end]
    if part.storage_offset() % dtype.itemsize:
        part = part.clone()  # not aligned: the format promises nothing about it
    return part.view(dtype).view(shape)


def write_safetensors(
    file: IO[bytes],
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterable[tuple[str, Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensor by tensor: only one is in memory at a time.

    `layout` gives every tensor's dtype and shape, in order; `tensors` yields (name, tensor) in that same order.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    names = iter(layout)
    for name, tensor in tensors:
        assert name == next(names) and (tensor.dtype, tuple(tensor.shape)) == layout[name], name
        file.write(as_bytes(tensor))
    assert next(names, None) is None


def as_bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row-major order; not copied if it lies like that on the CPU."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
