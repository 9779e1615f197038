"""safetensors files: read by their own library, memory-mapped; written tensor by tensor, which that cannot do.

A file is 8 bytes of length (little endian), a JSON header of that length, then the tensors' bytes:

    {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"key": "value"}}
"""

import json
import math
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


def is_safetensors(path: str | Path) -> bool:
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def open_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file in its order, memory-mapped (copy on write), and its metadata. UserError unless it is whole."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path}: reading it needs the package safetensors: pip install safetensors") from None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file, or damaged or cut short ({str(error).splitlines()[0][:120]})") from None
    if not tensors:
        raise UserError(f"{path}: holds no tensor")
    # the format promises no alignment
    return {name: t if t.data_ptr() % t.itemsize == 0 else t.clone() for name, t in tensors.items()}, metadata


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
