"""The World tokenizer's kernel, cpp/world.cpp: greedy matching of a vocabulary of byte strings. Imports no torch.

It writes arrays. pyrwkv-tokenizer makes lists of Python's numbers, which took more than half of the time of converting a file.
"""

import ctypes
import functools
import weakref
from collections.abc import Mapping, Sequence

import numpy as np

from . import build


@functools.cache
def library() -> ctypes.CDLL:
    """UserError where it is not there and cannot be built."""
    source = build.Object(build.source("cpp/world.cpp"))
    path = build.build("world", [source], build.cxx_compiler(), flags=("-O3", "-std=c++17", "-fPIC"))
    found = build.load(path)
    size, pointer = ctypes.c_int64, ctypes.c_void_p
    found.world_open.restype, found.world_open.argtypes = pointer, [size, ctypes.c_char_p, pointer, pointer]
    found.world_close.restype, found.world_close.argtypes = None, [pointer]
    found.world_encode.restype = size
    found.world_encode.argtypes = [pointer, ctypes.c_int, size, ctypes.c_char_p, pointer, pointer, pointer]
    return found


class Vocabulary:
    """entries   id -> bytes, which are different from each other, every single byte among them"""

    def __init__(self, entries: Mapping[int, bytes]):
        found = library()
        ordered = sorted(entries.items(), key=lambda item: item[1])
        tokens = np.array([token for token, _ in ordered], np.int32)
        ends = np.cumsum([len(entry) for _, entry in ordered], dtype=np.int64)
        joined = b"".join(entry for _, entry in ordered)
        self._tree = found.world_open(len(ordered), joined, ends.ctypes.data, tokens.ctypes.data)
        self._wide = int(tokens.max()) >= 1 << 16
        weakref.finalize(self, found.world_close, self._tree)

    def encode(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of all texts in one array, uint16, or int32 for larger ids, and how many each has, int64."""
        joined, lengths = b"".join(texts), np.fromiter(map(len, texts), np.int64, len(texts))
        tokens, counts = np.empty(len(joined), np.int32 if self._wide else np.uint16), np.empty(len(texts), np.int64)
        arrays = (lengths.ctypes.data, tokens.ctypes.data, counts.ctypes.data)
        total = library().world_encode(self._tree, self._wide, len(texts), joined, *arrays)
        return tokens[:total], counts
