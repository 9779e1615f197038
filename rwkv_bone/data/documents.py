"""Documents, whatever file they come from: for each its tokens and which of them are trained.

    documents = open_documents("data/mine", tokenizer=tokenizer, vocab_size=65536)
    len(documents);   documents[i] -> tokens int64 (size,), trained bool (size,)

binidx stays on disk, mapped. jsonl and text are tokenised once, into memory (2 to 5 bytes a token; for more than a few GB
make a binidx with jsonl_to_binidx).
"""

import os

import numpy as np

from ..errors import UserError
from .binidx import BinidxDocuments, prefix_of
from .jsonl import LOSS_MASKS, RowEncoder, encode_files, find_files
from .tokenizer import Tokenizer

DATA_TYPES = ("binidx", "jsonl", "numpy", "utf-8")
BLOCK = 1 << 22  # tokens checked at once


class Documents:
    """tokens  one flat array of any integer type (or float64 with whole numbers), in memory or mapped
    starts   int64 (n,), each document's first place in `tokens`;   sizes   (n,), tokens in each
    mask     uint8, as long as `tokens`, 1 = trained; None = all are
    name     for messages;   skipped   empty rows that were left out
    """

    def __init__(self, tokens, starts, sizes, mask=None, name="data", skipped: int = 0, reopen=None):
        self.tokens, self.mask = tokens, mask
        self.starts, self.sizes = np.asarray(starts, np.int64), np.asarray(sizes, np.int64)
        self.name, self.skipped = name, skipped
        self._reopen = reopen  # (function, arguments) that make the same again in another process

    @classmethod
    def from_binidx(cls, path, use_mask: bool = True) -> "Documents":
        docs = BinidxDocuments(path)
        mask = docs.mask if use_mask else None
        return cls(docs.tokens, docs.starts, docs.sizes, mask, docs.prefix, reopen=(cls.from_binidx, (docs.prefix, use_mask)))

    @classmethod
    def from_jsonl(cls, paths, encoder: RowEncoder, workers: int = 1) -> "Documents":
        """`paths`: files and globs."""
        files = find_files(paths)
        batches = list(encode_files(files, encoder, workers))
        skipped = sum(batch.skipped for batch in batches)
        batches = [batch for batch in batches if len(batch.sizes)]
        if not batches:
            raise UserError(f"{files[0]}: no document, {skipped} empty rows")
        mask = None
        if any(batch.mask is not None for batch in batches):
            ones = (np.ones(len(b.tokens), np.uint8) if b.mask is None else b.mask for b in batches)
            mask = np.concatenate(list(ones))
        sizes = np.concatenate([batch.sizes for batch in batches])
        return cls(np.concatenate([b.tokens for b in batches]), np.cumsum(sizes) - sizes, sizes, mask, files[0], skipped)

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

    @classmethod
    def from_text(cls, path, tokenizer: Tokenizer) -> "Documents":
        """A file of UTF-8 text: one document."""
        try:
            with open(path, encoding="utf-8", newline="") as file:
                text = file.read()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
        if not text:
            raise UserError(f"{path} is empty")
        try:
            tokens = np.array([*tokenizer.encode(text), *tokenizer.end], np.int32)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        return cls(tokens, [0], [len(tokens)], None, os.fspath(path))

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
        return Documents, (self.tokens, self.starts, self.sizes, self.mask, self.name, self.skipped)


def open_documents(
    data_file, data_type: str = "auto", tokenizer: Tokenizer | None = None, vocab_size: int | None = None, **options
) -> Documents:
    """The documents of a data set, its tokens checked against the vocabulary.

    data_file   a binidx prefix; or .jsonl / .jsonl.gz files (a list, or joined by commas, globs among them); or one .npy or
                text file
    data_type   "binidx", "jsonl", "numpy", "utf-8" (text), or "auto": by the ending, binidx where there is none
    tokenizer   for jsonl and text
    vocab_size  of the model; default: the tokenizer's, else no check
    options     of RowEncoder, for jsonl: templates, fields, format, loss_mask. loss_mask "all" or "pad" also overrules the
                mask of a binidx.
    """
    paths = [data_file] if isinstance(data_file, str | os.PathLike) else list(data_file)
    if len(paths) == 1 and "," in os.fspath(paths[0]) and not os.path.exists(paths[0]):
        paths = [path for path in os.fspath(paths[0]).split(",") if path]
    if not paths or not os.fspath(paths[0]):
        raise UserError("--data_file is missing")
    if data_type == "auto":
        path = os.fspath(paths[0])
        data_type = _type_of(path)
        if data_type == "binidx" and os.path.exists(path) and not os.path.exists(prefix_of(path) + ".idx"):
            cure = f"name the files in it: '{path}/*.jsonl'" if os.path.isdir(path) else "say what it is by --data_type"
            raise UserError(f"{path} is neither a binidx prefix nor .jsonl, .jsonl.gz, .txt or .npy; {cure}")
    if data_type not in DATA_TYPES:
        raise UserError(f"data_type {data_type!r} is not known; choose from {', '.join(DATA_TYPES)}")
    if data_type != "jsonl" and len(paths) > 1:
        raise UserError(f"{data_type} data are one file, not {len(paths)}; several may be jsonl")
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
        if data_type == "jsonl":
            documents = Documents.from_jsonl(paths, RowEncoder(tokenizer, **options))
        else:
            documents = Documents.from_text(paths[0], tokenizer)
    if vocab_size is None and tokenizer is not None:
        vocab_size = tokenizer.vocab_size
    if vocab_size is not None:
        documents.check_vocabulary(vocab_size)
    return documents


def _type_of(path: str) -> str:
    for endings, data_type in (((".jsonl", ".jsonl.gz"), "jsonl"), ((".npy",), "numpy"), ((".txt",), "utf-8")):
        if path.endswith(endings):
            return data_type
    return "binidx"
