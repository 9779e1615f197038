"""The rows of data files, in batches: .jsonl, .json, .csv, .tsv, .parquet, and text files, each a row of its own.

JSON is told by its content, not by its name: an object a line, objects over several lines, an array of objects, or an object that
holds one such array. All but .parquet and .npy may be packed (.gz), and begin with a byte order mark.
"""

import contextlib
import csv
import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Generator, Iterator
from typing import Any, BinaryIO, NamedTuple, cast

from ..errors import UserError
from .rows import NAMES, OTHER_NAMES, kind_of

KINDS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".csv": "jsonl", ".tsv": "jsonl", ".parquet": "jsonl",
         ".txt": "utf-8", ".npy": "numpy", ".idx": "binidx"}  # fmt: skip
BATCH_BYTES = 1 << 20  # rows travel to the workers in batches of about this size
MAX_LINE = 1 << 28  # a longer line is no jsonl but some other file
BOM = b"\xef\xbb\xbf"
SPACE = " \t\r\n"
decoder = json.JSONDecoder()


class Place(NamedTuple):
    """Where reading some files has come to."""

    file: int = 0  # which of them
    offset: int = 0  # bytes of its text, unpacked, before this place; not for files that are read from their beginning anyway
    row: int = 0  # lines, or rows, before it


BEGINNING = Place()


class Batch(NamedTuple):
    """Some consecutive rows of one file."""

    path: str
    unit: str  # what counts them for people: "line" or "row"; "text" for a text file, which is one row
    first: int  # number of the first, from 1
    content: bytes | list[Any]  # lines of jsonl, or rows
    read: int  # bytes taken from disk so far, over all files
    end: Place

    def where(self, number: int) -> str:
        return self.path if self.unit == "text" else f"{self.path}, {self.unit} {number}"

    def rows(self) -> Iterator[tuple[int, Any]]:
        """(number, row) of each; UserError names file and line."""
        if isinstance(self.content, list):
            yield from enumerate(self.content, self.first)
            return
        try:
            text = self.content.decode()
        except UnicodeDecodeError as error:
            number = self.first + self.content.count(b"\n", 0, error.start)
            byte = error.start - self.content.rfind(b"\n", 0, error.start) - 1
            raise UserError(f"{self.where(number)}: byte {byte} is no UTF-8; save the file as UTF-8") from None
        at, number, scan = 0, self.first, decoder.scan_once
        while at < len(text):
            end = text.find("\n", at)
            end = len(text) if end < 0 else end
            try:
                row, stop = scan(text, at)
                if stop != end:
                    raise StopIteration
            except (StopIteration, ValueError, RecursionError):  # a blank line, blanks around the object, or an error
                line = text[at:end].strip(SPACE)
                row = self._one(line, number) if line else None
            if type(row) is not dict and (row is not None or text[at:end].strip(SPACE)):
                raise UserError(f'{self.where(number)}: the line is {kind_of(row)}, wanted an object such as {{"text": ...}}')
            if row is not None:
                yield number, row
            at, number = end + 1, number + 1

    def _one(self, line: str, number: int):
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.where(number)}: broken JSON: {error}") from None


def kind_of_path(path) -> str:
    """What a file holds by its ending: one of the values of KINDS, "" where the ending says nothing."""
    name = os.fspath(path)
    return KINDS.get(ending(name), "")


def ending(path: str) -> str:
    return os.path.splitext(path.removesuffix(".gz"))[1].lower()


def find_files(patterns) -> list[str]:
    """The files that paths, globs and folders name, each glob's and folder's in order of name. UserError for one that names none.

    A folder stands for the data files in it, if they are of one kind; a binidx there for its .idx.
    """
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        pattern = os.fspath(pattern)
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError(f"{pattern}: no such file")
        found += [path for one in paths for path in (in_folder(one) if os.path.isdir(one) else [one])]
    return found


def in_folder(folder: str) -> list[str]:
    paths = [os.path.join(folder, name) for name in sorted(os.listdir(folder)) if not name.startswith(".")]
    paths = [path for path in paths if os.path.isfile(path) and ending(path) in KINDS]
    kinds = sorted({ending(path) for path in paths})
    if not paths:
        raise UserError(f"{folder} holds no data file ({', '.join(KINDS)})")
    if len(kinds) > 1 or (kinds == [".idx"] and len(paths) > 1):
        raise UserError(f"{folder} holds several kinds of data ({', '.join(kinds)}); name one: '{folder}/*{kinds[0]}'"
                        if len(kinds) > 1 else f"{folder} holds several binidx files; name one: {paths[0][:-4]}")  # fmt: skip
    return paths


def read_batches(paths: list[str], text: bool = False, start: Place = BEGINNING) -> Generator[Batch, None, None]:
    """The rows of files from `start` on. text: every file is text, else those named .txt (but JSON under that name is refused)."""
    before = 0
    for number, path in enumerate(paths):
        try:
            size = os.path.getsize(path)
            if number >= start.file:
                with open(path, "rb") as raw:
                    stream = cast(BinaryIO, gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw)
                    came = Place(number, *(start[1:] if number == start.file else ()))
                    if text or kind_of_path(path) == "utf-8":
                        batches = read_text(path, stream, came)
                    elif ending(path) in (".csv", ".tsv"):
                        batches = read_csv(path, stream, came)
                    elif ending(path) == ".parquet":
                        batches = read_parquet(path, came)
                    else:
                        batches = read_json(path, stream, came)
                    for batch in batches:
                        yield batch._replace(read=before + min(batch.read or raw.tell(), size))
            before += size
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def read_json(path: str, stream: BinaryIO, start: Place) -> Iterator[Batch]:
    head = stream.read(len(BOM))
    skip = len(BOM) if head == BOM else 0
    stream.seek(skip)
    first, blank = b"\n", 0
    while first.isspace():
        first = stream.readline(MAX_LINE + 1)
        blank += 1
    if len(first) > MAX_LINE:
        raise UserError(f"{path}, line {blank} is longer than {MAX_LINE >> 20} MiB; is this jsonl?")
    if over_lines(first):
        stream.seek(skip)
        with contextlib.suppress(NotRows):
            yield from read_values(path, stream.read(), start)
            return
    stream.seek(max(start.offset, skip))
    number = start.row
    while data := stream.read(BATCH_BYTES):
        if not data.endswith(b"\n"):
            data += (rest := stream.readline(MAX_LINE + 1))
            if len(rest) > MAX_LINE:
                line = number + data.count(b"\n") + 1
                raise UserError(f"{path}, line {line} is longer than {MAX_LINE >> 20} MiB; is this jsonl?")
        lines = data.count(b"\n") + (not data.endswith(b"\n"))
        yield Batch(path, "line", number + 1, data, 0, Place(start.file, stream.tell(), number + lines))
        number += lines


def over_lines(first: bytes) -> bool:
    """Whether JSON whose first line is this does not have an object a line: an array, or an object that goes on."""
    text = first.decode("utf-8", "replace").strip()
    if text.startswith("["):
        return True
    if not text.startswith("{"):
        return False
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text) or text.endswith(("{", "[", ","))
    except (ValueError, RecursionError):
        pass
    return False


class NotRows(Exception):
    """The text is no JSON over several lines."""


def read_values(path: str, data: bytes, start: Place) -> Iterator[Batch]:
    """The objects of an array, or one after the other. NotRows, before the first batch, where the first object is broken."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    size, at = len(data), _skip(text, 0)
    del data
    array = text.startswith("[", at)
    at, number, rows, began = _skip(text, at + array), 0, [], at
    while at < len(text) and not (array and text[at] == "]"):
        number += 1
        try:
            row, at = decoder.scan_once(text, at)
        except (StopIteration, ValueError, RecursionError) as error:
            if number == 1 and not array:
                raise NotRows from None
            raise UserError(f"{path}, row {number}: broken JSON: {str(error) or 'a value is missing'}") from None
        if type(row) is not dict:
            raise UserError(f'{path}, row {number} is {kind_of(row)}, wanted an object such as {{"text": ...}}')
        at = _skip(text, at)
        if text[at : at + 1] == "," or (array and text[at : at + 1] != "]"):
            if text[at : at + 1] != ",":
                raise UserError(f"{path}, row {number}: broken JSON: no comma or ] after it")
            at = _skip(text, at + 1)
        if number == 1 and at == len(text) and not array:
            yield from _batches_of(path, _unwrapped(row), start)
            return
        if number > start.row:
            rows.append(row)
        if at - began >= BATCH_BYTES and rows:
            yield Batch(path, "row", number - len(rows) + 1, rows, size * at // len(text), Place(start.file, 0, number))
            rows, began = [], at
    if array and (at >= len(text) or text[at + 1 :].strip(SPACE)):
        raise UserError(f"{path}: broken JSON: " + ("something follows the array" if at < len(text) else "the array has no end"))
    if rows:
        yield Batch(path, "row", number - len(rows) + 1, rows, 0, Place(start.file, 0, number))


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in SPACE:
        at += 1
    return at


def _unwrapped(only: dict) -> list[Any]:
    """The rows of a file that is one object: those of its one array of objects, if it has one, else itself."""
    own = {*NAMES, *(name for names in OTHER_NAMES.values() for name in names)}
    arrays = [v for k, v in only.items() if isinstance(v, list) and v and k not in own and all(isinstance(x, dict) for x in v)]
    return arrays[0] if len(arrays) == 1 and not own & only.keys() else [only]


def _batches_of(path: str, rows: list[Any], start: Place, count: int = 1000) -> Iterator[Batch]:
    for lo in range(start.row, len(rows), count):
        part = rows[lo : lo + count]
        yield Batch(path, "row", lo + 1, part, 0, Place(start.file, 0, lo + len(part)))


def read_csv(path: str, stream: BinaryIO, start: Place) -> Iterator[Batch]:
    csv.field_size_limit(MAX_LINE)
    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    rows, number, size = [], 0, 0
    try:
        reader = csv.reader(lines, delimiter="\t" if ending(path) == ".tsv" else ",", strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}: two columns have the same name")
        for fields in reader:
            if not fields:
                continue
            number += 1
            if len(fields) != len(header):
                raise UserError(f"{path}, row {number} has {len(fields)} fields where the first line names {len(header)}")
            if number > start.row:
                rows.append(dict(zip(header, fields)))
                size += sum(map(len, fields))
            if size >= BATCH_BYTES:
                yield Batch(path, "row", number - len(rows) + 1, rows, 0, Place(start.file, 0, number))
                rows, size = [], 0
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, after row {number}: {error.object[error.start]:#x} is no UTF-8; save the file as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}, row {number + 1}: {error}") from None
    finally:
        lines.detach()  # the caller closes it
    if rows:
        yield Batch(path, "row", number - len(rows) + 1, rows, 0, Place(start.file, 0, number))


def read_parquet(path: str, start: Place) -> Iterator[Batch]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"{path}: reading .parquet needs pyarrow; pip install pyarrow") from None
    try:
        with ParquetFile(path) as file:
            number, size = 0, os.path.getsize(path)
            for batch in file.iter_batches(1000):
                before, number = number, number + batch.num_rows
                if number > start.row:
                    rows = batch.to_pylist()[max(0, start.row - before) :]
                    read = size * number // file.metadata.num_rows
                    yield Batch(path, "row", number - len(rows) + 1, rows, read, Place(start.file, 0, number))
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None


def is_json(text: str) -> bool:
    """Whether a text is rows of JSON: its first line is an object, or the whole is one or an array of them."""
    text = text.lstrip()
    for part in (text.partition("\n")[0], text) if text.startswith(("{", "[")) else ():
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(part)
            return isinstance(value, dict) or (isinstance(value, list) and isinstance((value or [0])[0], dict))
    return False


def read_text(path: str, stream: BinaryIO, start: Place) -> Iterator[Batch]:
    if start.row:
        return
    try:
        text = stream.read().removeprefix(BOM).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
    if is_json(text):
        raise UserError(f"{path} holds JSON objects, whose braces and names would be trained as text; give --data_type jsonl")
    if not text:
        raise UserError(f"{path} is empty")
    yield Batch(path, "text", 1, [{"text": text}], 0, Place(start.file, 0, 1))
