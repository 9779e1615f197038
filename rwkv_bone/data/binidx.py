"""binidx: documents of tokens in two files, as Megatron, RWKV-LM's make_data.py and json2binidx write them.

    PREFIX.idx       little endian, nothing aligned:
                     9 bytes "MMIDIDX\\0\\0", uint64 version = 1, uint8 dtype code, uint64 N, uint64 D,
                     int32[N] sizes in tokens, int64[N] offsets in bytes, int64[D] doc_idx from 0 to N (D = N + 1)
    PREFIX.bin       the tokens, without a header
    PREFIX.mask.bin  ours, optional: one byte for each token of .bin, 1 where the token is trained (its prediction counts
                     in the loss), 0 where not. No such file: every token is trained. Other programs do not look at it.

The community's readers take each of the N sequences for a document, whatever doc_idx says; so do we.
Reading is by mmap and checks the whole index once. Writing goes to temporary files beside the target, is flushed to disk
and renamed with .idx last: whoever finds an .idx finds a whole data set.
"""

import contextlib
import json
import os
import struct
from array import array
from typing import Any, BinaryIO, cast

import numpy as np

from ..errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, N, D
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f8", 8: "<u2"}
CODES = {np.dtype(name): code for code, name in DTYPES.items() if "f" not in name}  # what we write: integers
BLOCK = 1 << 20  # entries handled at once, so that no temporary array grows with the file


def prefix_of(path) -> str:
    """`path` without a trailing .bin or .idx."""
    path = os.fspath(path)
    return path[:-4] if path.endswith((".bin", ".idx")) else path


class BinidxDocuments:
    """The documents of PREFIX.bin and PREFIX.idx: `len(docs)`, `docs[i]` -> the tokens of document i.

    tokens   all of .bin as one flat array of `dtype`, mapped from disk
    sizes    int32 (N,), tokens in each document;   starts   int64 (N,), each document's first position in `tokens`
    mask     uint8, as long as `tokens`, 1 = trained; None where there is no mask file
    Raises UserError, in one line, for files that are missing, damaged or not a pair.
    """

    def __init__(self, path):
        self.prefix = prefix_of(path)
        index_path, bin_path, mask_path = (self.prefix + end for end in (".idx", ".bin", ".mask.bin"))
        raw = _map(index_path)
        if raw[: len(MAGIC)].tobytes() != MAGIC[: len(raw)]:
            raise UserError(f"{index_path} does not begin with {MAGIC[:7].decode()}: it is no binidx index")
        if len(raw) < HEADER.size:
            raise UserError(f"{index_path} ends within its header: it is truncated; make it again")
        _, version, code, n, n_doc = HEADER.unpack(raw[: HEADER.size].tobytes())
        if version != 1:
            raise UserError(f"{index_path} has binidx version {version}; only version 1 is known")
        if code not in DTYPES:
            raise UserError(f"{index_path} has dtype code {code}; known are 1 to 8")
        self.dtype = np.dtype(DTYPES[code])
        wanted = HEADER.size + 12 * n + 8 * n_doc
        if len(raw) != wanted:
            raise UserError(
                f"{index_path} has {len(raw)} bytes, but {n} documents and {n_doc} borders take {wanted}: "
                "it is truncated or damaged; make it again"
            )
        if n == 0:
            raise UserError(f"{index_path} holds no document")
        at = HEADER.size
        self.sizes = raw[at : at + 4 * n].view("<i4")
        self._offsets = raw[at + 4 * n : at + 12 * n].view("<i8")
        self.doc_idx = raw[at + 12 * n :].view("<i8")
        self._check_borders(index_path)

        raw = _map(bin_path)
        self._check_places(index_path, bin_path, len(raw))
        self.tokens = raw.view(self.dtype)
        self.mask = None
        if os.path.exists(mask_path):
            self.mask = _map(mask_path)
            if len(self.mask) != len(self.tokens):
                raise UserError(
                    f"{mask_path} has {len(self.mask)} bytes for {len(self.tokens)} tokens of {bin_path}: "
                    "they are not of one making; make them again, or remove the mask to train everything"
                )
            if any(self.mask[lo : lo + BLOCK].max() > 1 for lo in range(0, len(self.mask), BLOCK)):
                raise UserError(f"{mask_path} holds bytes other than 0 and 1: it is damaged; make it again")

    def _check_borders(self, index_path: str) -> None:
        borders, n = self.doc_idx, len(self.sizes)
        ok = len(borders) > 0 and borders[0] == 0 and borders[-1] == n
        for lo in range(0, len(borders), BLOCK):
            ok = ok and bool((np.diff(borders[lo : lo + BLOCK + 1]) >= 0).all())
        if not ok:
            raise UserError(f"{index_path}: doc_idx does not rise from 0 to {n}: it is damaged; make it again")

    def _check_places(self, index_path: str, bin_path: str, n_bytes: int) -> None:
        """Each document lies inside .bin on a token's border, and .bin ends where the last one does."""
        end, step = 0, self.dtype.itemsize
        for lo in range(0, len(self.sizes), BLOCK):
            length = self.sizes[lo : lo + BLOCK].astype(np.int64) * step
            offset = self._offsets[lo : lo + BLOCK].astype(np.int64)
            outside = (length < 0) | (offset < 0) | (offset > n_bytes - length) | (offset % step != 0)
            if outside.any():
                i = lo + int(outside.argmax())
                raise UserError(
                    f"{index_path}: document {i} ({self.sizes[i]} tokens at byte {self._offsets[i]}) does not lie "
                    f"inside {bin_path} ({n_bytes} bytes): one of the two is truncated or damaged; make them again"
                )
            end = max(end, int((offset + length).max()))
        if end != n_bytes:
            raise UserError(
                f"{bin_path} has {n_bytes} bytes, but {index_path} describes {end}: they are not a pair; make them again"
            )

    def __len__(self) -> int:
        return len(self.sizes)

    @property
    def total_tokens(self) -> int:
        return int(self.sizes.sum(dtype=np.int64))

    @property
    def starts(self) -> np.ndarray:
        return self._offsets // self.dtype.itemsize

    def __getitem__(self, i) -> np.ndarray:
        """Tokens of document i, (size,) of `dtype`, read-only, a view of the file."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        start = int(self._offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]

    def __reduce__(self):  # another process maps the files itself
        return BinidxDocuments, (self.prefix,)


def _map(path: str) -> np.ndarray:
    """The bytes of a file as a read-only mmap: uint8 (size,)."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise UserError(f"{path} is not a file")
        if os.path.getsize(path) == 0:
            raise UserError(f"{path} is empty")
        return np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


class BinidxWriter:
    """Writes documents one after the other; the files appear, complete, when the `with` block ends without an error.

        with BinidxWriter("out/data", "uint16") as writer:
            writer.add(tokens, mask)

    dtype       "uint16" or "int32" (any integer type of the format)
    overwrite   without it, files of that name stop the writer before it begins
    key         where given, a writer that was killed or interrupted leaves PREFIX.part and *.part, and the next one with
                the same key goes on where it last called `save`; with another key it begins anew
    Memory: 4 bytes a document. The mask file is made at the first token that is not trained, else not at all.
    """

    def __init__(self, path, dtype="uint16", overwrite: bool = False, key: str | None = None):
        self.prefix = prefix_of(path)
        self.dtype = np.dtype(dtype).newbyteorder("<")
        if self.dtype not in CODES:
            raise UserError(f"dtype {np.dtype(dtype).name}: binidx is written as uint16 or int32")
        self.overwrite = overwrite
        self.total_tokens = self.trained_tokens = 0
        self.sizes = array("i")
        self.saved: Any = None  # what the writer from which this one goes on said to `save` last
        self.began_anew = False  # although there was one, of another key
        self._files: dict[str, BinaryIO] = {}  # ending -> open temporary file
        self._journal: BinaryIO | None = None  # PREFIX.part: the key, then a line for each `save`; locked while in use
        self._refuse_existing()
        try:
            os.makedirs(os.path.dirname(os.path.abspath(self.prefix)), exist_ok=True)
            done = self._take_up(key) if key is not None else None
            if done:
                self._go_on(**done)
            else:
                self._open(".bin")
                self._open(".idx")
                self._files[".idx"].write(bytes(HEADER.size))  # comes last
        except OSError as error:
            raise self._failed(error) from None

    def _take_up(self, key: str) -> dict[str, Any] | None:
        """What is to go on from, if anything is; else the journal begins with the key."""
        self._journal = open(f"{self.prefix}.part", "a+b")  # noqa: SIM115 (closed in _close)
        try:
            with contextlib.suppress(ImportError):  # not on Windows
                import fcntl

                fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.prefix} is being written by another process; wait, or choose another name") from None
        self._journal.seek(0)
        whole = self._journal.read().rpartition(b"\n")[0]
        first, *saved = whole.split(b"\n")
        if first == key.encode() and saved:
            with contextlib.suppress(ValueError, OSError):  # whatever a power cut left: all must be there
                done = json.loads(saved[-1])
                if all(os.path.getsize(self._temporary(end)) >= size for end, size in done["lengths"].items()):
                    self._journal.truncate(len(whole) + 1)
                    return done
        self.began_anew = first not in (b"", key.encode())
        with contextlib.suppress(FileNotFoundError):
            os.remove(self._temporary(".mask.bin"))  # the others are overwritten
        self._journal.truncate(0)
        self._journal.write(key.encode() + b"\n")
        self._journal.flush()
        return None

    def _go_on(self, lengths: dict[str, int], total_tokens: int, trained_tokens: int, saved: Any) -> None:
        self.total_tokens, self.trained_tokens, self.saved = total_tokens, trained_tokens, saved
        for end, size in lengths.items():
            self._open(end, "r+b")
            self._files[end].truncate(size)
            self._files[end].seek(size)
        self._files[".idx"].seek(HEADER.size)
        self.sizes.extend(np.frombuffer(self._files[".idx"].read(), "<i4").tolist())

    def save(self, saved: Any) -> None:
        """Make what is written so far the point from which the next writer goes on, and tell it `saved` (JSON)."""
        assert self._journal is not None
        try:
            for file in self._files.values():
                file.flush()
                os.fsync(file.fileno())
            lengths = {end: file.tell() for end, file in self._files.items()}
            counts = {"total_tokens": self.total_tokens, "trained_tokens": self.trained_tokens}
            self._journal.write(json.dumps({"lengths": lengths, **counts, "saved": saved}).encode() + b"\n")
            self._journal.flush()
            os.fsync(self._journal.fileno())
        except OSError as error:
            raise self._failed(error) from None

    def _refuse_existing(self) -> None:
        for end in (".idx", ".bin", ".mask.bin"):
            if os.path.exists(self.prefix + end) and not self.overwrite:
                raise UserError(f"{self.prefix}{end} is there already; choose another name or say --overwrite")

    def _failed(self, error: OSError) -> UserError:
        self._discard()
        return UserError(f"cannot write {self.prefix}.bin: {error.strerror}; free space or choose another folder")

    def _temporary(self, end: str) -> str:
        return f"{self.prefix}{end}.part" if self._journal else f"{self.prefix}{end}.{os.getpid()}.tmp"

    def _open(self, end: str, mode: str = "wb") -> None:
        self._files[end] = cast(BinaryIO, open(self._temporary(end), mode))  # noqa: SIM115 (closed in _close)

    def add(self, tokens, mask=None) -> None:
        """One document: tokens (size,), mask (size,) with 0 where a token is not trained."""
        tokens = np.asarray(tokens)
        self.extend(tokens, [len(tokens)], mask)

    def extend(self, tokens, sizes, mask=None) -> None:
        """Several documents, one after the other in `tokens` (sum of sizes,) and `mask` (the same length)."""
        tokens, sizes = np.asarray(tokens), np.asarray(sizes, np.int64)
        assert sizes.sum() == len(tokens) and (mask is None or len(mask) == len(tokens))
        limits = np.iinfo(self.dtype)
        if len(sizes) == 0:
            return
        if sizes.min() <= 0:
            raise UserError(f"document {len(self.sizes) + int(sizes.argmin())} is empty; leave it out")
        if sizes.max() > np.iinfo(np.int32).max:
            raise UserError(f"document {len(self.sizes) + int(sizes.argmax())} has {sizes.max()} tokens; split it")
        if tokens.min() < 0 or tokens.max() > limits.max:
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise UserError(f"token {worst} does not fit {self.dtype.name} (0 to {limits.max}); write int32")
        trained = len(tokens) if mask is None else int(np.count_nonzero(mask))
        try:
            if trained < len(tokens) and ".mask.bin" not in self._files:
                self._open(".mask.bin")
                self._train_all(self.total_tokens)
            if trained < len(tokens):
                self._files[".mask.bin"].write((np.asarray(mask) != 0).tobytes())
            elif ".mask.bin" in self._files:
                self._train_all(len(tokens))
            self._files[".bin"].write(np.ascontiguousarray(tokens, self.dtype).tobytes())
            self._files[".idx"].write(sizes.astype("<i4").tobytes())
        except OSError as error:
            raise self._failed(error) from None
        self.sizes.extend(sizes.tolist())
        self.total_tokens += len(tokens)
        self.trained_tokens += trained

    def _train_all(self, count: int) -> None:
        for lo in range(0, count, BLOCK):
            self._files[".mask.bin"].write(b"\x01" * min(BLOCK, count - lo))

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback) -> None:
        if kind is not None:
            if self._journal and not issubclass(kind, Exception):  # interrupted
                self._close()
            else:
                self._discard()
            return
        try:
            self._finish()
        except OSError as error:
            raise self._failed(error) from None
        except BaseException:
            self._discard()
            raise

    def _write_index(self) -> None:
        """What follows the sizes, and the header."""
        n, out = len(self.sizes), self._files[".idx"]
        sizes = np.frombuffer(self.sizes, np.int32)
        start = 0
        for lo in range(0, n, BLOCK):
            ends = start + np.cumsum(sizes[lo : lo + BLOCK], dtype=np.int64) * self.dtype.itemsize
            out.write(np.concatenate(([start], ends[:-1])).astype("<i8").data)
            start = int(ends[-1])
        for lo in range(0, n + 1, BLOCK):
            out.write(np.arange(lo, min(lo + BLOCK, n + 1), dtype="<i8").data)
        out.seek(0)
        out.write(HEADER.pack(MAGIC, 1, CODES[self.dtype], n, n + 1))

    def _finish(self) -> None:
        if not self.sizes:
            raise UserError(f"no document for {self.prefix}.bin: nothing is written")
        self._write_index()
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._refuse_existing()  # somebody may have made them in the meantime
        # At every moment an .idx stands for whole files: the old one goes first, the new one comes last.
        for end in (".idx", ".mask.bin"):
            if os.path.exists(self.prefix + end):
                os.remove(self.prefix + end)
        self._sync_folder()
        for end in (".bin", ".mask.bin", ".idx"):
            if end in self._files:
                os.replace(self._temporary(end), self.prefix + end)
                del self._files[end]
                self._sync_folder()
        self._discard()  # the journal

    def _sync_folder(self) -> None:
        if os.name != "posix":  # other systems cannot open a folder
            return
        folder = os.open(os.path.dirname(os.path.abspath(self.prefix)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _close(self) -> None:
        for file in (*self._files.values(), *([self._journal] if self._journal else [])):
            with contextlib.suppress(OSError):  # a full disk refuses the last buffer once more
                file.close()

    def _discard(self) -> None:
        for end in self._files:
            os.remove(self._temporary(end))
        if self._journal:
            os.remove(f"{self.prefix}.part")
        self._close()
        self._files = {}
