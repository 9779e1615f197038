"""Rows and texts -> binidx, on all cores, with memory flat in the size of the files (.json arrays are read whole).

    python -m rwkv_bone.data.jsonl_to_binidx in.jsonl [more.jsonl.gz 'folder/*.jsonl' mine.csv] out

writes out.bin and out.idx, and out.mask.bin where not every token is trained (binidx.py, encode.py). They appear when they are
complete: a run that is stopped or killed leaves out.part and out.*.part, and the same command goes on from there, to the same
files. Where an input or an option has changed it begins anew. The .part files may be deleted.
"""

import contextlib
import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass

from .. import __version__
from ..errors import Parser, UserError, run
from ..terminal import Progress
from .binidx import BinidxWriter, prefix_of
from .documents import data_of
from .encode import LOSS_MASKS, RowEncoder, encode_files, parse_fields
from .files import BEGINNING, KINDS, Place, ending, find_files
from .rows import FORMATS, Tally
from .templates import Template
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
    tally: Tally
    seconds: float
    read: int  # bytes, of this run


def identity(paths: list[str], encoder: RowEncoder, dtype: str) -> str:
    """All that decides what is written: an interrupted run goes on where it is the same."""
    tokenizer = encoder.tokenizer
    files = [*paths, *(getattr(tokenizer, name) for name in ("vocab_file", "path") if hasattr(tokenizer, name))]
    stats = [(os.path.abspath(path), os.path.getsize(path), os.stat(path).st_mtime_ns) for path in files]
    kind = (type(tokenizer).__name__, tokenizer.vocab_size, tokenizer.encoding)
    options = repr((encoder.template.source, encoder.fields, encoder.format, encoder.loss_mask))
    return json.dumps([__version__, dtype, stats, kind, options])


def convert(
    inputs, output, encoder: RowEncoder, dtype="auto", workers: int = 0, overwrite: bool = False, data_type="auto", say=None
) -> Summary:
    """Writes the binidx `output` from files of rows or texts; globs and folders may be among them.

    data_type "jsonl" or "utf-8", or "auto": by the endings
    dtype     "uint16", "int32", or "auto": uint16 where the vocabulary fits
    workers   processes; 0 = all cores for more than a few MB
    say       called with a line about an earlier run that was interrupted; None: nothing is said and no progress shown
    """
    start = time.perf_counter()
    inputs, data_type = data_of(inputs, data_type)
    if data_type not in ("jsonl", "utf-8"):
        raise UserError(f"{inputs[0]} is {data_type}, wanted rows (.jsonl, .json, .csv, .parquet) or text (.txt)")
    paths = find_files(inputs)
    total = sum(map(os.path.getsize, paths))
    if dtype == "auto":
        dtype = "uint16" if encoder.tokenizer.vocab_size <= 1 << 16 else "int32"
    if not workers:
        workers = 1 if total < SMALL else _cores()
    with BinidxWriter(output, dtype, overwrite, identity(paths, encoder, dtype)) as writer:
        place, read_before, counts = writer.saved or (BEGINNING, 0, {})
        tally = Tally(**counts)
        if say and writer.saved:
            say(f"{writer.prefix}.part: going on after {len(writer.sizes):,} documents that an interrupted run wrote")
        if say and writer.began_anew:
            say(f"{writer.prefix}.part: an interrupted run had another input or other options; beginning anew")
        saved_at = time.monotonic()
        progress = Progress(total, read_before, "B") if say else None
        encoded = encode_files(paths, encoder, workers, Place(*place), data_type == "utf-8")
        with progress or contextlib.nullcontext(), contextlib.closing(encoded) as batches:
            for batch in batches:
                writer.extend(batch.tokens, batch.sizes, batch.mask)
                tally.add(batch.tally)
                if time.monotonic() - saved_at >= SAVE_SECONDS:
                    writer.save((batch.end, batch.read, asdict(tally)))
                    saved_at = time.monotonic()
                if progress:
                    progress.update(batch.read, f"{len(writer.sizes):,} documents")
        if not writer.sizes:
            raise UserError(f"{paths[0]}: no document; {tally.nothing()}; nothing is written")
    seconds, read = time.perf_counter() - start, total - read_before
    return Summary(len(writer.sizes), writer.total_tokens, max(writer.sizes), writer.trained_tokens, tally, seconds, read)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv=None) -> None:
    parser = Parser(prog="python -m rwkv_bone.data.jsonl_to_binidx", description="rows and texts -> binidx", allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="in.jsonl", help="files of rows or texts, folders, or globs in quotes")
    add("output", metavar="out", help="written are out.bin, out.idx and, where needed, out.mask.bin")
    add("--tokenizer", default="auto", help="auto (by vocabulary), world, byte, or a path to a tokenizer.json")
    add("--vocab_size", type=int, default=65536, help="of the model; default 65536")
    add("--data_type", default="auto", choices=["auto", "jsonl", "utf-8"], help="rows or text; default: by the ending")
    add("--vocab_file", help="another vocabulary in the format of World's")
    add("--encoding", default="utf-8", help="of byte tokens: utf-8 or utf-16-le")
    add("--dtype", default="auto", choices=["auto", "uint16", "int32"], help="of the tokens in .bin; default by vocabulary")
    add("--loss_mask", default="answer", choices=LOSS_MASKS, help="trained: answers of pairs and chats and all of texts; or all")
    add("--template", default="world", help="world, g1 or a jinja2 file of your own (see rwkv_bone/data/templates.py)")
    add("--fields", default="", help="names in your file: question=problem,answer=solution")
    add("--format", default="auto", choices=FORMATS, help="what rows are that can be read in two ways")
    add("--workers", type=int, default=0, help="processes; default all cores")
    add("--overwrite", action="store_true", help="replace files of that name")
    args = parser.parse_args(argv)

    if ending(args.output) in KINDS and not args.output.endswith(".idx"):
        raise UserError(f"the last argument is the name to write, but {args.output} looks like an input; add a name such as data")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leaves by the same doors as an error: nothing half-written stays
    tokenizer = open_tokenizer(args.tokenizer, args.vocab_size, args.vocab_file, args.encoding)
    encoder = RowEncoder(tokenizer, Template.open(args.template), parse_fields(args.fields), args.format, args.loss_mask)
    summary = convert(args.inputs, args.output, encoder, args.dtype, args.workers, args.overwrite, args.data_type, print)
    print(f"documents  {summary.documents:,}")
    for line in summary.tally.lines():
        print(f"           {line}")
    print(f"tokens     {summary.tokens:,}, {summary.tokens / summary.documents:,.1f} a document")
    print(f"longest    {summary.longest:,} tokens")
    print(f"trained    {summary.trained:,} tokens ({summary.trained / summary.tokens:.1%})")
    print(f"time       {summary.seconds:.1f} s, {summary.read / 1e6 / summary.seconds:.1f} MB/s")
    prefix = prefix_of(args.output)
    masked = summary.trained < summary.tokens
    print(f"written    {prefix}.bin, {prefix}.idx" + (f", {prefix}.mask.bin" if masked else ""))


if __name__ == "__main__":
    run(main)
