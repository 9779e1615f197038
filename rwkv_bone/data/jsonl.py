"""jsonl -> documents: for each row its tokens and which of them are trained.

    {"text": ...}                                         as it stands; all of it is trained
    {"question": ..., "answer": ...}                      User: {question}\\n\\nAssistant: {answer}
    {"prompt": ..., "response": ...}                      User: {prompt}\\n\\nAssistant: {response}
    {"instruction": ..., "input": ..., "output": ...}     Instruction: ...\\n\\nInput: ...\\n\\nResponse: {output}, or as above if
                                                          there is no input
    {"messages": [{"role": ..., "content": ...}, ...]}    User: ...\\n\\nAssistant: ...\\n\\nUser: ...
and the tokenizer's end of document after each. In all but the first only answers are trained, with what ends them: the blank
line before the next turn, or the end of the document. Markers of roles are not. The mask is made where the text is tokenised:
each stretch of untrained and of trained text is tokenised by itself. So a prompt has the very tokens that it has when a model
is asked, and the border is exact ("Assistant:" is followed by " answer", for in the World vocabulary a space belongs to the
word after it).

These are the formats of the RWKV World models (their model cards): within a field a blank line would read as the end of the
turn, so fields are stripped and their blank lines dropped. A template file (JSON) replaces any part:

    {"pairs": [{"prompt": "Q: {question}\\nA:", "answer": " {answer}"}, ...],      the first whose fields are all there is taken
     "chat": {"markers": {"user": "Q:", "assistant": "A:"}, "trained": ["assistant"], "before": " ", "after": "\\n\\n"},
     "blank_lines": "drop" | "keep"}

Rows whose text or answer is empty are left out and counted. Every other defect stops with the name of the file and the line.
"""

import glob
import gzip
import json
import multiprocessing
import os
import re
import signal
import threading
import zlib
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .tokenizer import Tokenizer

LOSS_MASKS = ("answer", "all", "pad")
BATCH_BYTES = 1 << 20  # lines travel to the workers in batches of about this size
MAX_LINE = 1 << 28  # a longer line is no jsonl but some other file
PLACEHOLDER = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Pair:
    """A template of a prompt, which is not trained, and an answer, which is. {name} stands for a field of the row."""

    prompt: str
    answer: str

    @cached_property
    def names(self) -> list[str]:
        return PLACEHOLDER.findall(self.prompt + self.answer)


@dataclass(frozen=True)
class Chat:
    """marker + before + content + after for each message; the last `after` gives way to the end of the document."""

    markers: dict[str, str] = field(
        default_factory=lambda: {
            "system": "System:",
            "user": "User:",
            "human": "User:",
            "assistant": "Assistant:",
            "gpt": "Assistant:",
        }
    )
    trained: tuple[str, ...] = ("assistant", "gpt")
    before: str = " "
    after: str = "\n\n"


@dataclass(frozen=True)
class Templates:
    pairs: tuple[Pair, ...] = (
        Pair("User: {question}\n\nAssistant:", " {answer}"),
        Pair("Instruction: {instruction}\n\nInput: {input}\n\nResponse:", " {output}"),
        Pair("User: {instruction}\n\nAssistant:", " {output}"),
        Pair("User: {prompt}\n\nAssistant:", " {response}"),
    )
    chat: Chat = Chat()
    blank_lines: str = "drop"

    @classmethod
    def from_file(cls, path) -> "Templates":
        """The built-in templates with what the JSON file at `path` replaces."""
        try:
            with open(path, encoding="utf-8") as file:
                given = json.load(file)
            pairs = tuple(Pair(**pair) for pair in given.pop("pairs", [])) or cls.pairs
            chat = given.pop("chat", {})
            if "trained" in chat:
                chat["trained"] = tuple(chat["trained"])
            made = cls(pairs, replace(Chat(), **chat), **given)
            made._check(path)
        except OSError as error:
            raise UserError(f"cannot read the template {path}: {error.strerror}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is no template file (pairs, chat, blank_lines): {str(error).splitlines()[0]}") from None
        return made

    def _check(self, path) -> None:
        for pair in self.pairs:
            if not (isinstance(pair.prompt, str) and isinstance(pair.answer, str) and PLACEHOLDER.search(pair.answer)):
                raise UserError(f"{path}: a pair needs a text 'prompt' and an 'answer' that names a field, as in ' {{answer}}'")
        chat = self.chat
        texts = (*chat.markers.values(), chat.before, chat.after) if isinstance(chat.markers, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}: 'markers' is a text for each role, 'before' and 'after' are texts")
        if unknown := [role for role in chat.trained if role not in chat.markers]:
            raise UserError(f"{path}: role {unknown[0]!r} is to be trained but has no marker")
        if self.blank_lines not in ("drop", "keep"):
            raise UserError(f"{path}: blank_lines is {self.blank_lines!r}; it may be drop or keep")


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into tokens. Goes to other processes by pickle.

    fields      {our name: the file's name}, as {"question": "problem", "answer": "solution"}
    format      "auto", or the one kind of row to look for: "text", "messages", or a pair by its first field ("question")
    loss_mask   "answer" (answers of pairs and chats, all of texts), "all" or "pad" (every token: only padding is left out)
    """

    tokenizer: Tokenizer
    templates: Templates = Templates()
    fields: dict[str, str] = field(default_factory=dict)
    format: str = "auto"
    loss_mask: str = "answer"

    def __post_init__(self):
        if self.loss_mask not in LOSS_MASKS:
            raise UserError(f"loss_mask {self.loss_mask!r} is not known; choose from {', '.join(LOSS_MASKS)}")
        kinds = ["auto", "text", "messages", *dict.fromkeys(pair.names[0] for pair in self.templates.pairs)]
        if self.format not in kinds:
            raise UserError(f"format {self.format!r} is not known; choose from {', '.join(kinds)}")
        known = {"text", "messages", "role", "content", *(name for pair in self.templates.pairs for name in pair.names)}
        if unknown := [name for name in self.fields if name not in known]:
            raise UserError(f"no template has a field {unknown[0]!r}; fields are {', '.join(sorted(known))}")

    def segments(self, row: dict) -> list[tuple[str, bool]] | None:
        """The row's text in stretches (text, trained), neighbours differing; None for an empty row.

        The first stretch of a pair is the prompt to ask a model with."""
        pairs = [pair for pair in self.templates.pairs if all(self._name(name) in row for name in pair.names)]
        kinds = [kind for kind in ("text", "messages") if self._name(kind) in row]
        kinds += dict.fromkeys(pair.names[0] for pair in pairs)
        if self.format != "auto":
            kinds = [kind for kind in kinds if kind == self.format]
        if not kinds:
            wanted = "text, messages or a pair such as question and answer" if self.format == "auto" else self.format
            raise UserError(f"wanted {wanted}, got the fields {', '.join(map(repr, row)) or '(none)'}; name them by --fields")
        if len(kinds) > 1:
            raise UserError(f"the row can be read as {' or '.join(kinds)}; say which by --format")
        if kinds == ["text"]:
            return self._text_segments(row)
        if kinds == ["messages"]:
            return self._chat_segments(row[self._name("messages")])
        return self._pair_segments(row, [pair for pair in pairs if pair.names[0] == kinds[0]])

    def _name(self, name: str) -> str:
        return self.fields.get(name, name)

    def _field(self, row: dict, name: str, clean: bool = True) -> str:
        text = row.get(self._name(name)) or ""  # null is as good as nothing
        if not isinstance(text, str):
            raise UserError(f"{self._name(name)!r} is {_kind(text)}, wanted text")
        if not clean:
            return text
        text = text.replace("\r\n", "\n").strip()
        return re.sub("\n\n+", "\n", text) if self.templates.blank_lines == "drop" else text

    def _text_segments(self, row: dict) -> list[tuple[str, bool]] | None:
        text = self._field(row, "text", clean=False)
        return [(text, True)] if text else None

    def _pair_segments(self, row: dict, pairs: list[Pair]) -> list[tuple[str, bool]] | None:
        for pair in pairs:
            values = {name: self._field(row, name) for name in pair.names}
            if all(values.values()):
                answer = (_fill(pair.answer, values), True)
                return [(_fill(pair.prompt, values), False), answer] if pair.prompt else [answer]
        return None

    def _chat_segments(self, messages) -> list[tuple[str, bool]] | None:
        if not isinstance(messages, list):
            raise UserError(f"{self._name('messages')!r} is {_kind(messages)}, wanted a list")
        chat, segments = self.templates.chat, []
        for number, message in enumerate(messages):
            if not isinstance(message, dict):
                raise UserError(f"message {number} is {_kind(message)}, wanted an object with role and content")
            role, content = self._field(message, "role"), self._field(message, "content")
            if role not in chat.markers:
                raise UserError(f"message {number} has the role {role!r}; known are {', '.join(chat.markers)}")
            if not content:
                return None
            after = chat.after if number < len(messages) - 1 else ""
            segments += [(chat.markers[role], False), (chat.before + content + after, role in chat.trained)]
        if not any(trained for _, trained in segments):
            return None
        merged = [segments[0]]
        for text, trained in segments[1:]:
            if trained == merged[-1][1]:
                merged[-1] = (merged[-1][0] + text, trained)
            else:
                merged.append((text, trained))
        return merged

    def __call__(self, row: dict) -> tuple[list[int], list[int] | None] | None:
        """Tokens of the row with the end of document, and for each 1 (trained) or 0, None where all are; None: an empty row."""
        segments = self.segments(row)
        if segments is None:
            return None
        tokens, mask = [], []
        for text, trained in segments:
            ids = self.tokenizer.encode(text)
            tokens += ids
            mask += [int(trained)] * len(ids)
        tokens += self.tokenizer.end
        if self.loss_mask in ("all", "pad"):
            return tokens, None
        mask += [int(segments[-1][1])] * len(self.tokenizer.end)
        return tokens, None if all(mask) else mask


def _fill(template: str, values: dict[str, str]) -> str:
    return PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _kind(value) -> str:
    names = {type(None): "null", bool: "a boolean", int: "a number", float: "a number", str: "a text", list: "a list"}
    return names.get(type(value), "an object")


class Place(NamedTuple):
    """Where reading some files has come to."""

    file: int = 0  # which of them
    offset: int = 0  # bytes of its text, unpacked, before this place
    line: int = 0  # lines before it


BEGINNING = Place()


class Lines(NamedTuple):
    """Some consecutive lines of one file."""

    path: str
    first: int  # number of the first line, from 1
    lines: list[bytes]
    read: int  # bytes taken from disk so far, over all files
    end: Place


class Encoded(NamedTuple):
    """Some consecutive documents."""

    tokens: np.ndarray  # (sum of sizes,)
    sizes: np.ndarray  # int64 (documents,)
    mask: np.ndarray | None  # uint8, as long as tokens; None = all trained
    skipped: int  # empty rows left out
    read: int  # bytes taken from disk so far
    end: Place  # the documents of the files up to there have come


def find_files(patterns) -> list[str]:
    """The files that paths and globs name, each glob's in order of name. UserError for one that names none."""
    found: list[str] = []
    for pattern in [patterns] if isinstance(patterns, str | os.PathLike) else patterns:
        pattern = os.fspath(pattern)
        paths = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern, recursive=True))
        if not paths:
            raise UserError(f"{pattern}: no such file")
        if folders := [path for path in paths if not os.path.isfile(path)]:
            raise UserError(f"{folders[0]} is not a file; for all in a folder say {os.path.join(folders[0], '*.jsonl')}")
        found += paths
    return found


def read_lines(paths: list[str], start: Place = BEGINNING) -> Iterator[Lines]:
    """The non-empty lines of .jsonl and .jsonl.gz files from `start` on, in batches."""
    before = 0
    for place, path in enumerate(paths):
        try:
            if place < start.file:
                before += os.path.getsize(path)
                continue
            with open(path, "rb") as raw:
                stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
                number, lines, size = 0, [], 0
                if place == start.file:
                    number = start.line
                    stream.seek(start.offset)
                first = number + 1
                while line := stream.readline(MAX_LINE + 1):
                    number += 1
                    if len(line) > MAX_LINE:
                        raise UserError(f"{path}, line {number} is longer than {MAX_LINE >> 20} MiB; is this jsonl?")
                    lines.append(line)
                    size += len(line)
                    if size >= BATCH_BYTES:
                        yield Lines(path, first, lines, before + raw.tell(), Place(place, stream.tell(), number))
                        first, lines, size = number + 1, [], 0
                before += raw.tell()
                if lines:
                    yield Lines(path, first, lines, before, Place(place, stream.tell(), number))
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def encode_lines(batch: Lines, encoder: RowEncoder) -> Encoded:
    """Documents of one batch. UserError names the file and the line."""
    tokens, sizes, masks, skipped, masked = [], [], [], 0, False
    for number, line in enumerate(batch.lines, batch.first):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if not text:
                continue
            row = json.loads(text)
            if not isinstance(row, dict):
                raise UserError(f"the line is {_kind(row)}, wanted an object such as {{\"text\": ...}}")
            document = encoder(row)
        except UnicodeDecodeError as error:
            raise UserError(f"{batch.path}, line {number}: byte {error.start} is no UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            reason = f"broken JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
            raise UserError(f"{batch.path}, line {number}: {reason}") from None
        if document is None:
            skipped += 1
            continue
        ids, mask = document
        tokens += ids
        sizes.append(len(ids))
        masks.append(mask)
        masked = masked or mask is not None
    dtype = np.uint16 if encoder.tokenizer.vocab_size <= 1 << 16 else np.int32
    flat = None
    if masked:
        flat = np.ones(len(tokens), np.uint8)
        for end, size, mask in zip(np.cumsum(sizes), sizes, masks):
            if mask is not None:
                flat[end - size : end] = mask
    return Encoded(np.array(tokens, dtype), np.array(sizes, np.int64), flat, skipped, batch.read, batch.end)


def encode_files(
    paths: list[str], encoder: RowEncoder, workers: int = 1, start: Place = BEGINNING
) -> Generator[Encoded, None, None]:
    """Documents of all files in order, whatever the number of processes; at most a few batches a worker are held at once."""
    batches = read_lines(paths, start)
    if workers <= 1:
        yield from (encode_lines(batch, encoder) for batch in batches)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            waiting.append(pool.submit(_work, batch))
            if len(waiting) >= 3 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: RowEncoder  # of a worker process


def _start_worker(encoder: RowEncoder) -> None:
    global _encoder
    _encoder = encoder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()  # nor outlive it


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _work(batch: Lines) -> Encoded:
    return encode_lines(batch, _encoder)


def parse_fields(text: str) -> dict[str, str]:
    """'question=problem,answer=solution' -> {"question": "problem", "answer": "solution"}."""
    pairs = [item.split("=") for item in text.split(",") if item]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"--fields {text!r}: wanted name=NAME_IN_THE_FILE, several joined by commas")
    return dict(pairs)
