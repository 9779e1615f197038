"""Measure a model, with or without an adapter.

python -m rwkv_bone.evaluate gsm8k --model M.pth [--peft_checkpoint A.pth] --data test.jsonl
python -m rwkv_bone.evaluate math  --model M.pth --data test.jsonl
python -m rwkv_bone.evaluate loss  --model M.pth --data TEXT.txt | DATA.jsonl | BINIDX
"""

import argparse
import hashlib
import io
import sys
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import truth
from ..data.documents import DATA_TYPES, open_documents
from ..data.encode import RowEncoder, parse_fields
from ..data.files import find_files
from ..errors import Parser, UserError
from ..generate import GREEDY
from ..generate.command import (
    add_model_flags,
    add_sampling_flags,
    memory_advice,
    open_model,
    sampling_of,
    template_of,
    tokenizer_of,
)
from ..models import LanguageModel
from ..ops.float32 import set_matmul_backend
from . import loss, problems
from .grading import GRADERS, open_grader
from .results import Results


def make_parser() -> argparse.ArgumentParser:
    shape = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog="rwkv_bone.evaluate", description=__doc__, formatter_class=shape, allow_abbrev=False)
    kinds = parser.add_subparsers(dest="task", required=True, metavar="gsm8k|math|loss")
    for name, task in problems.TASKS.items():
        sub = kinds.add_parser(name, help="share of right answers", allow_abbrev=False)
        add = add_data_flags(sub, "jsonl files of problems with solutions, globs among them").add_argument
        add("--limit", type=int, default=0, help="only the first so many problems; 0: all")
        add("--shots", type=int, default=0, help="solved problems shown before each (default: 0)")
        add("--shots_data", default="", metavar="F.jsonl", help="where those come from: its first ones")
        text = f"longest solution, in tokens (default: {task.max_tokens})"
        add("--max_tokens", type=int, default=task.max_tokens, help=text)
        text = "math-verify compares what is meant; original has the rules of the benchmark's paper (default: math-verify)"
        add("--grader", choices=GRADERS, default=GRADERS[0], help=text)
        add("--stop", action="append", default=[], help="another text that ends a solution; may be given several times")
        add_sampling_flags(sub, GREEDY, 64)
        add_model_flags(sub)
    sub = kinds.add_parser("loss", help="loss per token, perplexity, bits per byte", allow_abbrev=False)
    add = add_data_flags(sub, "a binidx prefix, jsonl files (globs, .gz), a text or a .npy file").add_argument
    add("--data_type", default="auto", choices=("auto", *DATA_TYPES), help="what --data is; auto goes by its name")
    add("--loss_mask", default="answer", choices=("answer", "all"), help="count what training would train, or all tokens")
    add("--count_end", type=truth, default=True, metavar="0|1", help="count the prediction of documents' ends too (default: 1)")
    add("--batch_size", type=int, default=8, help="documents at once (default: 8)")
    add("--chunk_len", type=int, default=1024, help="tokens of each at once (default: 1024)")
    add_model_flags(sub)
    return parser


def add_data_flags(parser: argparse.ArgumentParser, text: str) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("task")
    group.add_argument("--data", "--data_file", required=True, nargs="+", help=text)
    group.add_argument("--fields", default="", metavar="question=problem,...", help="names of the fields in the file")
    group.add_argument("--template", default="", metavar="world|g1|FILE", help="chat template (default: the one of training)")
    text = "results, a line an item; an interrupted evaluation goes on from there (default: here, named after model and data)"
    group.add_argument("--out", default="", metavar="F.jsonl", help=text)
    group.add_argument("--overwrite", action="store_true", help="forget the results in --out")
    return group


def open_results(args: argparse.Namespace, model: LanguageModel, settings: dict[str, Any]) -> Results:
    """The results of this very evaluation: the same model, data and settings."""
    path = args.out
    if not path:
        of = Path(args.peft_checkpoint or args.model).absolute()
        name = f"{of.parent.name}-{of.stem}" if args.peft_checkpoint else of.stem  # rwkv-0.pth is in every run's folder
        path = f"{name}.{args.task}-{Path(args.data[0]).name.split('.')[0]}.jsonl"
    same = {
        "task": args.task,
        "model": model.fingerprint[:16],
        "adapter": file_hash([args.peft_checkpoint]) if args.peft_checkpoint else "",
        "dtype": str(model.dtype),
        "tokenizer": [args.tokenizer, args.encoding],
    }
    kinds = loss.ITEM if args.task == "loss" else problems.ITEM
    results = Results(path, {**same, **settings}, args.overwrite, kinds)
    if results.done:
        print(f"{len(results.done):,} items are taken from {results.path}; --overwrite starts anew", file=sys.stderr, flush=True)
    return results


def file_hash(paths: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()[:16]


def evaluate_problems(args: argparse.Namespace) -> None:
    task = problems.TASKS[args.task]
    if args.limit < 0 or args.shots < 0 or args.max_tokens < 1:
        raise UserError("--limit and --shots must be at least 0, --max_tokens at least 1")
    if args.shots and not args.shots_data:
        raise UserError(f"--shots {args.shots} needs --shots_data, a file of solved problems (not those of --data)")
    grader = open_grader(args.grader, args.task)
    sampling = sampling_of(args)
    fields = {**task.fields, **parse_fields(args.fields)}
    files = find_files(args.data)
    model = open_model(args)
    tokenizer = tokenizer_of(args, model)
    template = template_of(args, model)
    encoder = RowEncoder(tokenizer, template, fields, loss_mask="all")
    shots: list[problems.Problem] = []
    if args.shots:
        shots = problems.read_problems(grader, find_files([args.shots_data]), encoder, fields["answer"], args.shots)
        if len(shots) < args.shots:
            raise UserError(f"--shots {args.shots}: {args.shots_data} has only {len(shots)} problems")
    asked = problems.read_problems(grader, files, encoder, fields["answer"], args.limit, shots)
    shown = problems.shown(template, shots)
    stop = [*args.stop, *template.stops]
    settings = {
        "grader": grader.name,
        "data": file_hash(files),
        "fields": fields,
        "template": template.identity(),
        "shots": shown,
        "max_tokens": args.max_tokens,
        "stop": stop,
        "sampling": asdict(sampling),
        "seed": args.seed,
    }
    with open_results(args, model, settings) as results:
        with memory_advice("take a smaller --batch_size"):
            begin = () if template.whole else tokenizer.begin
            state = problems.read_shots(model, tokenizer, shown, begin)
            options = (sampling, args.max_tokens, stop, args.seed, args.batch_size)
            with closing(grader):
                problems.solve(grader, model, tokenizer, asked, results, *options, state=state, begin=begin)
        found = problems.summary(results, {problem.id for problem in asked})
        print(problems.describe(args.task, found, args.max_tokens))
        print(f"each answer is in {results.path}")


def evaluate_loss(args: argparse.Namespace) -> None:
    model = open_model(args)
    template = template_of(args, model)
    try:
        tokenizer = tokenizer_of(args, model)
    except UserError:
        if args.tokenizer != "auto":
            raise
        tokenizer = None  # binidx needs none but for bits per byte; others say that they do
    of_rows = {"template": template, "fields": parse_fields(args.fields), "loss_mask": args.loss_mask}
    documents = open_documents(args.data, args.data_type, tokenizer, model.sizes.vocab_size, **of_rows)
    set_matmul_backend(model.device.type, args.batch_size * args.chunk_len)
    with open_results(args, model, {"data": loss.identity(documents), "count_end": args.count_end}) as results:
        with memory_advice("take a smaller --batch_size or --chunk_len"):
            loss.measure(model, documents, results, tokenizer, args.count_end, args.batch_size, args.chunk_len)
        print(loss.describe(loss.summary(results), args.count_end))
        print(f"each document is in {results.path}")


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if args.task == "loss":
        evaluate_loss(args)
    else:
        evaluate_problems(args)
