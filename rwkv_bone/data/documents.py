"""Documents, whatever file they come from: for each its tokens and which of them are trained.

    documents = open_documents("data/mine", tokenizer=tokenizer, vocab_size=65536)
    len(documents);   documents[i] -> tokens int64 (size,), trained bool (size,)

binidx stays on disk, mapped. Rows and text are tokenised once, into memory (2 to 5 bytes a token; for more than a few GB make a
binidx with jsonl_to_binidx).
"""

import glob
import os
from collections.abc import Iterable

import numpy as np

from ..errors import UserError
from .binidx import BinidxDocuments, prefix_of
from .encode import LOSS_MASKS, Encoded, RowEncoder, encode_files
from .files import KINDS, find_files, kind_of_path
from .rows import Tally
from .tokenizer import Tokenizer

DATA_TYPES = ("binidx", "jsonl", "numpy", "utf-8")
BLOCK = 1 << 22  # tokens checked at once


class Documents:
    """tokens  one flat array of any integer type (or float64 with whole numbers), in memory or mapped
    starts   int64 (n,), each document's first place in `tokens`;   sizes   (n,), tokens in each
    mask     uint8, as long as `tokens`, 1 = trained; None = all are
    name     for messages;   tally   what happened to the rows of the files: left out, changed, fields not read
    """

    def __init__(self, tokens, starts, sizes, mask=None, name="data", tally: Tally | None = None, reopen=None):
        self.tokens, self.mask = tokens, mask
        self.starts, self.sizes = np.asarray(starts, np.int64), np.asarray(sizes, np.int64)
        self.name, self.tally = name, tally or Tally()
        self._reopen = reopen  # (function, arguments) that make the same again in another process

    @classmethod
    def from_binidx(cls, path, use_mask: bool = True) -> "Documents":
        docs = BinidxDocuments(path)
        mask = docs.mask if use_mask else None
        return cls(docs.tokens, docs.starts, docs.sizes, mask, docs.prefix, reopen=(cls.from_binidx, (docs.prefix, use_mask)))

    @classmethod
    def from_rows(cls, paths, encoder: RowEncoder, workers: int = 1, text: bool = False) -> "Documents":
        """`paths`: files, globs and folders. text: each file is one text, whatever its name."""
        files = find_files(paths)
        return cls.from_encoded(encode_files(files, encoder, workers, text=text), files[0])

    @classmethod
    def from_encoded(cls, encoded: Iterable[Encoded], name: str) -> "Documents":
        """All documents of some batches, in memory; UserError if there is none."""
        batches, tally = list(encoded), Tally()
        for batch in batches:
            tally.add(batch.tally)
        batches = [batch for batch in batches if len(batch.sizes)]
        if not batches:
            raise UserError(f"{name}: no document; {tally.nothing()}")
        mask = None
        if any(batch.mask is not None for batch in batches):
            mask = np.concatenate([np.ones(len(b.tokens), np.uint8) if b.mask is None else b.mask for b in batches])
        sizes = np.concatenate([batch.sizes for batch in batches])
        return cls(np.concatenate([b.tokens for b in batches]), np.cumsum(sizes) - sizes, sizes, mask, name, tally)

    @classmethod
    def from_numpy(cls, path) -> "Documents":
        """A .npy file with a flat array of tokens: one document."""
        try:
            tokens = np.load(path, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from None
        except Exception as error:  # a damaged header makes numpy raise what its parser raises
            raise UserError(f"{path} is no .npy file: {str(error).splitlines()[0]}") from None
        if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) == 0:
            raise UserError(f"{path}: wanted a flat array of whole numbers, as numpy.save writes it")
        return cls(tokens.view(np.ndarray), [0], [len(tokens)], None, os.fspath(path), reopen=(cls.from_numpy, (path,)))

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, i) -> tuple[np.ndarray, np.ndarray]:
        """Document i: tokens int64 (size,), trained bool (size,)."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.span(int(self.starts[i]), int(self.sizes[i]))

    def span(self, begin: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """`length` consecutive tokens of the flat array: int64 (length,), bool (length,)."""
        tokens = self.tokens[begin : begin + length].astype(np.int64)
        return tokens, np.ones(length, bool) if self.mask is None else self.mask[begin : begin + length] != 0

    @property
    def total_tokens(self) -> int:
        return int(self.sizes.sum())

    def check_vocabulary(self, vocab_size: int) -> None:
        """UserError, naming document and place, if any token is not in 0 .. vocab_size - 1."""
        kind = self.tokens.dtype.kind
        if kind == "u" and np.iinfo(self.tokens.dtype).max < vocab_size:
            return
        for lo in range(0, len(self.tokens), BLOCK):
            piece = self.tokens[lo : lo + BLOCK]
            good = (piece >= 0) & (piece < vocab_size)
            if kind == "f":
                good &= piece == np.floor(piece)
            if not good.all():
                at = lo + int(good.argmin())
                inside = np.flatnonzero((self.starts <= at) & (at < self.starts + self.sizes))
                place = f"document {inside[0]}, token {at - self.starts[inside[0]]}" if len(inside) else f"token {at}"
                raise UserError(
                    f"{self.name}: {place} is {self.tokens[at]}, but the vocabulary is 0 to {vocab_size - 1}: "
                    "the data were made with another tokenizer; make them with the model's"
                )

    def __reduce__(self):
        if self._reopen:
            return self._reopen
        return Documents, (self.tokens, self.starts, self.sizes, self.mask, self.name, self.tally)


def open_documents(
    data_file, data_type: str = "auto", tokenizer: Tokenizer | None = None, vocab_size: int | None = None, **options
) -> Documents:
    """The documents of a data set, its tokens checked against the vocabulary.

    data_file   a binidx prefix; or files of rows (files.py) or text, a list or joined by commas, globs and folders among them;
                or one .npy file
    data_type   "binidx", "jsonl" (rows of any kind), "numpy", "utf-8" (text), or "auto": by the ending, else binidx
    tokenizer   for rows and text
    vocab_size  of the model; default: the tokenizer's, else no check
    options     of RowEncoder, for rows: template (a Template), fields, format, loss_mask. loss_mask "all" or "pad" also overrules
                the mask of a binidx.
    """
    paths, data_type = data_of(data_file, data_type)
    if data_type in ("binidx", "numpy") and len(paths) > 1:
        raise UserError(f"{data_type} data are one file, not {len(paths)}; several may be jsonl or text")
    if data_type in ("jsonl", "utf-8") and tokenizer is None:
        raise UserError(f"{data_type} data need a tokenizer")
    loss_mask = options.get("loss_mask", "answer")
    if loss_mask not in LOSS_MASKS:
        raise UserError(f"loss_mask {loss_mask!r} is not known; choose from {', '.join(LOSS_MASKS)}")
    if data_type == "binidx":
        documents = Documents.from_binidx(paths[0], use_mask=loss_mask == "answer")
    elif data_type == "numpy":
        documents = Documents.from_numpy(paths[0])
    else:
        assert tokenizer is not None
        documents = Documents.from_rows(paths, RowEncoder(tokenizer, **options), text=data_type == "utf-8")
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    if vocab_size is not None:
        documents.check_vocabulary(vocab_size)
    return documents


def data_of(data_file, data_type: str = "auto") -> tuple[list[str], str]:
    """The paths that --data_file names, and which of DATA_TYPES they are. A folder stands for what it holds."""
    given = data_file if isinstance(data_file, list | tuple) else [data_file]
    paths = [os.fspath(path) for path in given]
    if len(paths) == 1 and "," in paths[0] and not os.path.exists(paths[0]):
        paths = [path for path in paths[0].split(",") if path]
    if not any(paths):
        raise UserError("--data_file is missing")
    if data_type not in ("auto", *DATA_TYPES):
        raise UserError(f"data_type {data_type!r} is not known; choose from {', '.join(DATA_TYPES)}")
    unnamed = [path for path in paths if os.path.isdir(path) or (glob.has_magic(path) and not kind_of_path(path))]
    found = find_files(paths) if unnamed else paths
    if data_type == "auto":
        kinds = {kind_of_path(path) or "binidx" for path in found}
        if len(kinds) > 1:
            raise UserError(f"{', '.join(found[:3])} are of several kinds ({', '.join(sorted(kinds))}); say which by --data_type")
        data_type = kinds.pop()
    if data_type == "binidx":
        found = [_binidx_prefix(path) for path in found]
    return found, data_type


def _binidx_prefix(path: str) -> str:
    """The prefix of the binidx that `path` means: json2binidx adds _text_document to the name it is given."""
    prefix = prefix_of(path)
    if os.path.exists(prefix + ".idx"):
        return prefix
    if os.path.exists(prefix + "_text_document.idx"):
        return prefix + "_text_document"
    if os.path.isfile(path) and path == prefix:
        raise UserError(f"{path} is neither a binidx prefix nor named {', '.join(KINDS)}; say what it is by --data_type")
    return prefix
