"""jsonl -> binidx, on all cores, with memory flat in the size of the files.

    python -m rwkv_bone.data.jsonl_to_binidx in.jsonl [more.jsonl.gz 'folder/*.jsonl'] out

writes out.bin and out.idx, and out.mask.bin where not every token is trained (binidx.py, jsonl.py). They appear when they are
complete: a run that is stopped or killed leaves out.part and out.*.part, and the same command goes on from there, to the same
files. Where an input or an option has changed it begins anew. The .part files may be deleted.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import dataclass

from .. import __version__
from ..errors import Parser, UserError, run
from .binidx import BinidxWriter, prefix_of
from .jsonl import BEGINNING, LOSS_MASKS, Place, RowEncoder, Templates, encode_files, find_files, parse_fields
from .tokenizer import open_tokenizer

SMALL = 4 << 20  # bytes; below, starting processes takes longer than the work
SAVE_SECONDS = 2.0  # at least so long between two points from which an interrupted run goes on


@dataclass(frozen=True)
class Summary:
    """What was written."""

    documents: int
    tokens: int
    longest: int
    trained: int
    skipped: int
    seconds: float
    read: int  # bytes, of this run


def identity(paths: list[str], encoder: RowEncoder, dtype: str) -> str:
    """All that decides what is written: an interrupted run goes on where it is the same."""
    tokenizer = encoder.tokenizer
    files = [*paths, *(getattr(tokenizer, name) for name in ("vocab_file", "path") if hasattr(tokenizer, name))]
    stats = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
    kind = (type(tokenizer).__name__, tokenizer.vocab_size, tokenizer.encoding)
    options = repr((encoder.templates, encoder.fields, encoder.format, encoder.loss_mask))
    return json.dumps([__version__, dtype, stats, kind, options])


def convert(
    inputs, output, encoder: RowEncoder, dtype="auto", workers: int = 0, overwrite: bool = False, report=None, say=None
) -> Summary:
    """Writes the binidx `output` from jsonl files, globs among them.

    dtype     "uint16", "int32", or "auto": uint16 where the vocabulary fits
    workers   processes; 0 = all cores for more than a few MB
    report    called with (bytes read, bytes in all, documents so far)
    say       called with a line about an earlier run that was interrupted
    """
    start = time.perf_counter()
    paths = find_files(inputs)
    total = sum(map(os.path.getsize, paths))
    if dtype == "auto":
        dtype = "uint16" if encoder.tokenizer.vocab_size <= 1 << 16 else "int32"
    if not workers:
        workers = 1 if total < SMALL else _cores()
    with BinidxWriter(output, dtype, overwrite, identity(paths, encoder, dtype)) as writer:
        place, read_before, skipped = writer.saved or (BEGINNING, 0, 0)
        if say and writer.saved:
            say(f"{writer.prefix}.part: going on after {len(writer.sizes):,} documents that an interrupted run wrote")
        if say and writer.began_anew:
            say(f"{writer.prefix}.part: an interrupted run had another input or other options; beginning anew")
        if report:
            report(read_before, total, len(writer.sizes))
        saved_at = time.monotonic()
        with contextlib.closing(encode_files(paths, encoder, workers, Place(*place))) as batches:
            for batch in batches:
                writer.extend(batch.tokens, batch.sizes, batch.mask)
                skipped += batch.skipped
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    writer.save((batch.end, batch.read, skipped))
                    saved_at = time.monotonic()
                if report:
                    report(batch.read, total, len(writer.sizes))
        if not writer.sizes:
            raise UserError(f"{paths[0]}: no document, {skipped} empty rows; nothing is written")
    seconds, read = time.perf_counter() - start, total - read_before
    return Summary(len(writer.sizes), writer.total_tokens, max(writer.sizes), writer.trained_tokens, skipped, seconds, read)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Progress:
    """A bar where the stream is a terminal, else a plain line every ten seconds."""

    def __init__(self, stream=None):
        self.stream = stream or sys.stderr
        self.bar = self.stream.isatty()
        self.start = time.monotonic()
        self.shown = self.start if not self.bar else 0.0
        self.before: int | None = None  # read by an earlier run

    def __call__(self, done: int, total: int, documents: int) -> None:
        now = time.monotonic()
        self.before = done if self.before is None else self.before
        if now - self.shown < (0.1 if self.bar else 10) and not (self.bar and done >= total):
            return
        self.shown = now
        share, speed = done / max(total, 1), (done - self.before) / max(now - self.start, 1e-9)
        left = (total - done) / max(speed, 1e-9)
        text = f"{share:4.0%} {documents:,} documents, {speed / 1e6:.1f} MB/s, {left:.0f} s left"
        if self.bar:
            text = f"\r[{'#' * int(30 * share):30}] {text}   "
        print(text, end="" if self.bar else "\n", file=self.stream, flush=True)

    def close(self) -> None:
        if self.bar and self.shown:
            print(file=self.stream)


def main(argv=None) -> None:
    parser = Parser(prog="python -m rwkv_bone.data.jsonl_to_binidx", description="jsonl files -> binidx", allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="in.jsonl", help=".jsonl or .jsonl.gz files, or globs in quotes")
    add("output", metavar="out", help="written are out.bin, out.idx and, where needed, out.mask.bin")
    add("--tokenizer", default="auto", help="auto (by vocabulary), world, byte, or a path to a tokenizer.json")
    add("--vocab_size", type=int, default=65536, help="of the model; default 65536")
    add("--vocab_file", help="the World vocabulary, where no installed package has it")
    add("--encoding", default="utf-8", help="of byte tokens: utf-8 or utf-16-le")
    add("--dtype", default="auto", choices=["auto", "uint16", "int32"], help="of the tokens in .bin; default by vocabulary")
    add("--loss_mask", default="answer", choices=LOSS_MASKS, help="trained: answers of pairs and chats and all of texts; or all")
    add("--template", help="JSON file with templates of your own (see rwkv_bone/data/jsonl.py)")
    add("--fields", default="", help="names in your file: question=problem,answer=solution")
    add("--format", default="auto", help="where rows can be read in two ways: text, messages, question, instruction, prompt")
    add("--workers", type=int, default=0, help="processes; default all cores")
    add("--overwrite", action="store_true", help="replace files of that name")
    args = parser.parse_args(argv)

    if args.output.endswith((".jsonl", ".gz", ".json")):
        raise UserError(f"the last argument is the name to write, but {args.output} looks like an input; add a name such as data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves by the same doors as an error: nothing half-written stays
    tokenizer = open_tokenizer(args.tokenizer, args.vocab_size, args.vocab_file, args.encoding)
    templates = Templates.from_file(args.template) if args.template else Templates()
    encoder = RowEncoder(tokenizer, templates, parse_fields(args.fields), args.format, args.loss_mask)
    progress = Progress()
    try:
        summary = convert(args.inputs, args.output, encoder, args.dtype, args.workers, args.overwrite, progress, print)
    finally:
        progress.close()
    print(f"documents  {summary.documents:,}" + (f" ({summary.skipped:,} empty rows left out)" if summary.skipped else ""))
    print(f"tokens     {summary.tokens:,}, {summary.tokens / summary.documents:,.1f} a document")
    print(f"longest    {summary.longest:,} tokens")
    print(f"trained    {summary.trained:,} tokens ({summary.trained / summary.tokens:.1%})")
    print(f"time       {summary.seconds:.1f} s, {summary.read / 1e6 / summary.seconds:.1f} MB/s")
    prefix = prefix_of(args.output)
    masked = summary.trained < summary.tokens
    print(f"written    {prefix}.bin, {prefix}.idx" + (f", {prefix}.mask.bin" if masked else ""))


if __name__ == "__main__":
    run(main)
