"""Rows -> documents: for each row its tokens and which of them are trained, in batches, on one process or several.

A row becomes a conversation (rows.py), its template the text and what of it is trained (templates.py), each stretch of which is
tokenised by itself. The tokenizer's end of document follows, trained where the last stretch is.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .files import BEGINNING, Batch, Place, read_batches
from .rows import Conversation, LeftOut, RowReader, Tally, turns
from .templates import Template, refuse_marks
from .tokenizer import Tokenizer

LOSS_MASKS = ("answer", "all", "pad")
NOTHING_TRAINED = "without a trained token"
ALTERNATING = [False, True]


class Encoded(NamedTuple):
    """Some consecutive documents."""

    tokens: np.ndarray  # (sum of sizes,)
    sizes: np.ndarray  # int64 (documents,)
    mask: np.ndarray | None  # uint8, as long as tokens; None = all trained
    tally: Tally
    read: int  # bytes taken from disk so far
    end: Place  # the documents of the files up to there have come


@dataclass(frozen=True)
class RowEncoder:
    """Turns rows into tokens. Goes to other processes by pickle.

    fields      {our name: the file's name}, as {"question": "problem", "answer": "solution"}
    format      "auto", or what to take rows for that can be read in several ways (rows.py, FORMATS)
    loss_mask   "answer" (answers of conversations, all of other texts), "all" or "pad" (every token: only padding is left out)
    """

    tokenizer: Tokenizer
    template: Template = field(default_factory=Template.open)
    fields: dict[str, str] = field(default_factory=dict)
    format: str = "auto"
    loss_mask: str = "answer"

    def __post_init__(self):
        if self.loss_mask not in LOSS_MASKS:
            raise UserError(f"loss_mask {self.loss_mask!r} is not known; choose from {', '.join(LOSS_MASKS)}")
        self.reader  # noqa: B018 (refuses fields that are not known)

    @cached_property
    def reader(self) -> RowReader:
        return RowReader(self.fields, self.format)

    def conversation(self, row: dict) -> Conversation | str | None:
        """What a row says, a text for a text row; None where there is nothing to train."""
        try:
            return self.reader(row, Tally())
        except LeftOut:
            return None

    def encode(self, batch: Batch) -> Encoded:
        """The documents of a batch. UserError names the file and the row."""
        collecting = gc.isenabled()
        gc.disable()  # thousands of lists and dicts come, none of them in a cycle: looking for such takes a fifth of the time
        try:
            return self._encode(batch)
        finally:
            if collecting:
                gc.enable()

    def _encode(self, batch: Batch) -> Encoded:
        tally, items, numbers = Tally(), [], []
        for number, row in batch.rows():
            try:
                items.append(self.reader(row, tally))
                numbers.append(number)
            except LeftOut as reason:
                tally.note(tally.left_out, str(reason), batch.where(number))
            except UserError as error:
                raise UserError(f"{batch.where(number)}: {error}") from None
        try:
            return self._documents(batch, tally, items, numbers)
        except UserError:
            for number, item in zip(numbers, items):  # which of them is it?
                try:
                    refuse_marks([item] if isinstance(item, Conversation) else [])  # by place in its text
                    self._documents(batch, Tally(), [item], [number])
                except UserError as error:
                    raise UserError(f"{batch.where(number)}: {error}") from None
            raise

    def _documents(self, batch: Batch, tally: Tally, items: list, numbers: list[int]) -> Encoded:
        stretches: list[str] = []  # of all documents
        trained: list[bool] = []  # whether each is
        counts = []  # how many a document has
        whole = []  # whether its template writes a document's beginning and end
        talks: list[Conversation] = [item for item in items if type(item) is not str]
        rendered = iter(self.template.pieces(talks))
        for number, item in zip(numbers, items):
            if is_text := type(item) is str:
                cut = turns(item) if self.loss_mask == "answer" and batch.unit != "text" else None
                tally.turns += cut is not None
                pieces, flags = map(list, zip(*cut or [(item, True)]))
            else:
                pieces, changed = next(rendered)
                if changed:
                    tally.note(tally.changed, "blank lines or \\r left out of a turn", batch.where(number))
                if len(pieces) == 1 and self.loss_mask == "answer" and not self.template.marks:
                    cure = "put {% generation %} ... {% endgeneration %} around the assistant's part, or give --loss_mask all"
                    raise UserError(f"the template {self.template.name} does not mark what is trained; {cure}")
                flags = ALTERNATING * (len(pieces) // 2) + ALTERNATING[: len(pieces) % 2]
            if self.loss_mask == "answer" and True not in flags:
                tally.note(tally.left_out, NOTHING_TRAINED, batch.where(number))
                continue
            stretches += pieces
            trained += flags
            counts.append(len(pieces))
            whole.append(not is_text and self.template.whole)
        tokens, lengths = self.tokenizer.encode_documents(stretches, counts)
        counts_ = np.array(counts, np.int64)
        tokens, lengths = self._with_ends(tokens, lengths, counts_, np.array(whole, bool))
        sizes = np.add.reduceat(lengths, np.cumsum(counts_) - counts_) if counts else np.zeros(0, np.int64)
        mask = None
        if self.loss_mask == "answer" and not all(trained):
            mask = np.repeat(np.array(trained, np.uint8), lengths)
        return Encoded(tokens, sizes, mask, tally, batch.read, batch.end)

    def _with_ends(self, tokens: np.ndarray, lengths: np.ndarray, counts: np.ndarray, whole: np.ndarray):
        """Tokens and lengths of stretches with what begins a document in its first and what ends it in its last."""
        begin, end = self.tokenizer.begin, self.tokenizer.end
        last = np.cumsum(counts) - 1
        stops = np.cumsum(lengths)
        starts = (stops - lengths)[last - counts + 1]
        unended = ~whole
        if whole.any():  # of a document's last two stretches one is the answer, and white space may follow it
            final = lengths > 0
            final[final] = np.isin(tokens[stops[final] - 1], [*self.tokenizer.stops])
            unended |= ~(final[last] | (final[last - 1] & (counts > 1)))
        known = np.zeros((2, max(len(begin), len(end))), np.int64)
        known[0, : len(begin)], known[1, : len(end)] = begin, end
        # document by document, for one may have no token between its beginning and its end
        places = np.stack([starts, stops[last]], 1).ravel()
        numbers = np.stack([~whole * len(begin), unended * len(end)], 1).ravel()
        within = np.arange(numbers.sum()) - np.repeat(np.cumsum(numbers) - numbers, numbers)
        added = known[np.repeat(np.arange(len(numbers)) % 2, numbers), within]
        lengths = lengths.copy()
        lengths[last - counts + 1] += numbers[::2]
        lengths[last] += numbers[1::2]
        return np.insert(tokens, np.repeat(places, numbers), added), lengths


def encode_files(
    paths: list[str], encoder: RowEncoder, workers: int = 1, start: Place = BEGINNING, text: bool = False
) -> Generator[Encoded, None, None]:
    """Documents of all files in order, whatever the number of processes; at most a few batches a worker are held at once."""
    batches = read_batches(paths, text, start)
    if workers <= 1:
        yield from map(encoder.encode, batches)
        return
    encoder.tokenizer.encode("a")  # its kernel is built here, not by all workers at once
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads can hang
    pool = ProcessPoolExecutor(workers, context, _start_worker, (encoder,))
    pending: deque[Future[Encoded]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_work, batch))
            if len(pending) >= 3 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool:
        raise UserError("a worker process died, perhaps for want of memory; try fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


_encoder: RowEncoder  # of a worker process


def _start_worker(encoder: RowEncoder) -> None:
    global _encoder
    _encoder = encoder
    os.environ["RAYON_NUM_THREADS"] = "1"  # other tokenizers would start a thread a core in each worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()  # nor outlive it


def _end_with(parent) -> None:
    parent.join()
    os._exit(1)


def _work(batch: Batch) -> Encoded:
    return _encoder.encode(batch)


def parse_fields(text: str) -> dict[str, str]:
    """'question=problem,answer=solution' -> {"question": "problem", "answer": "solution"}."""
    pairs = [item.split("=") for item in text.split(",") if item]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise UserError(f"--fields {text!r}: wanted name=NAME_IN_THE_FILE, several joined by commas")
    return dict(pairs)
