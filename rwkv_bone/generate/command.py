"""python -m rwkv_bone.generate: continue prompts, or chat, with a model and an adapter.

    python -m rwkv_bone.generate --model M.pth [--peft_checkpoint A.pth] --prompt "In the beginning" [--prompt ...]
    python -m rwkv_bone.generate --model M.pth --chat
"""

import argparse
import contextlib
import io
import json
import os
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..data.templates import Template
from ..data.tokenizer import ENCODINGS, KINDS, Tokenizer, open_tokenizer, recorded
from ..errors import Parser, UserError
from ..files.adapters import load_adapter, read_info
from ..files.atomic import atomic
from ..files.models import load_model, read_about
from ..interop.rwkv_peft import Foreign
from ..models import Execution, LanguageModel
from ..ops.wkv6 import OPS
from ..peft import merge
from .chat import as_asked, chat
from .sampling import DEFAULT, Completion, Sampling, completions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", "--load_model", required=True, metavar="M.pth", help="model file")
    group.add_argument("--peft_checkpoint", default="", metavar="A.pth", help="adapter to merge into it first")
    group.add_argument("--lora_alpha", type=float, help="alpha of RWKV-PEFT's LoRA files, which do not say it")
    group.add_argument("--lora_init", "--pissa_init", default="", metavar="F.pth", help="init_pissa.pth of RWKV-PEFT's PiSSA")
    group.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    group.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="auto: bf16 on a GPU, fp32 on the CPU")
    group.add_argument("--op", default="auto", choices=OPS, help="kernel of the recurrence; torch needs no compiler")
    text = "byte, world, or a tokenizer.json; auto: that of the training, or by vocabulary size"
    group.add_argument("--tokenizer", default="auto", help=text)
    group.add_argument("--vocab_file", default="", help="World vocabulary file, where no installed package has it")
    group.add_argument("--encoding", default="", choices=("utf-8", "utf-16-le"), help="of the byte tokenizer")


def open_model(args: argparse.Namespace) -> LanguageModel:
    """The model of --model and --peft_checkpoint, merged and ready to run."""
    device = pick_device(args.device)
    if args.op in ("cpu", "cuda", "fla") and ("cuda" if args.op == "fla" else args.op) != device.type:
        raise UserError(f"--op {args.op} does not run on --device {device}; leave it out")
    dtype = DTYPES.get(args.dtype) or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    refuse_adapter(args.model)
    model = load_model(args.model, dtype, device, Execution(args.op))
    about = read_about(args.model)
    told = args.lora_alpha is not None or args.lora_init
    if args.peft_checkpoint:
        info = load_adapter(model, args.peft_checkpoint, foreign=Foreign(args.lora_alpha, args.lora_init))
        if told and "foreign" not in info:
            raise UserError(f"{args.peft_checkpoint}: says all of itself; leave --lora_alpha and --lora_init out")
        about |= info
        merge(model)
    elif told:
        raise UserError("--lora_alpha and --lora_init belong to a --peft_checkpoint")
    args.trained_with, args.trained_template = about.get("tokenizer"), about.get("template")
    model.requires_grad_(False).eval()
    return model


def refuse_adapter(path: str) -> None:
    """UserError where a model is wanted and an adapter of this program is given."""
    if os.path.isfile(path) and zipfile.is_zipfile(path) and read_info(path) is not None:
        raise UserError(f"--model {path} is an adapter, not a model; give its base as --model and this as --peft_checkpoint")


def tokenizer_of(args: argparse.Namespace, model: LanguageModel) -> Tokenizer:
    """The tokenizer that the flags ask for, else that of the model's training; a warning where the flags contradict it."""
    if args.tokenizer == "auto" and not (args.vocab_file or args.encoding or model.text):
        found = recorded(args.trained_with, [args.peft_checkpoint, args.model])
        args.tokenizer, args.vocab_file = found.get("spec", "auto"), found.get("vocab_file", "")
        args.encoding = found.get("encoding", "")
    args.encoding = args.encoding or "utf-8"
    tokenizer = open_tokenizer(args.tokenizer, model.sizes.vocab_size, args.vocab_file or None, args.encoding, model.text)
    if cure := other_tokenizer(args.trained_with, tokenizer):
        trained = args.peft_checkpoint or args.model
        print(f"warning: {trained} was not trained with {tokenizer}; give {cure}", file=sys.stderr, flush=True)
    return tokenizer


def template_of(args: argparse.Namespace, model: LanguageModel) -> Template:
    """The template that the flags ask for, else that of the adapter's training, else the one that came with the model."""
    if args.template:
        return Template.open(args.template)
    return Template.of(args.trained_template) if args.trained_template else Template.of_model(model.text, "world")


def other_tokenizer(trained_with: Any, tokenizer: Tokenizer) -> str:
    """The flags that give the tokenizer of an adapter's record; "" if it is this one, or the record says nothing that we know."""
    if not isinstance(trained_with, dict):
        return ""
    kind, encoding = trained_with.get("kind"), trained_with.get("encoding")
    flags = []
    if kind in KINDS and kind != tokenizer.kind:
        flags.append("--tokenizer " + ("PATH/tokenizer.json" if kind == "tokenizer.json" else kind))
    if encoding in ENCODINGS and encoding != tokenizer.encoding:
        flags.append(f"--encoding {encoding}")
    return " ".join(flags)


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device takes auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: torch sees {torch.cuda.device_count()} GPUs; python -m rwkv_bone.doctor says why")
    return device


def add_sampling_flags(parser: argparse.ArgumentParser, default: Sampling, batch_size: int = 32) -> None:
    group = parser.add_argument_group("sampling")
    texts = {
        "temperature": ("--temperature", "above 1 wilder, below 1 tamer, 0: always the likeliest token"),
        "top_p": ("--top_p", "sample among the likeliest tokens that have this probability together"),
        "top_k": ("--top_k", "and among so many at most; 0: any number"),
        "alpha_presence": ("--alpha_presence", "--presence_penalty", "subtracted from the logit of what was said before"),
        "alpha_frequency": ("--alpha_frequency", "--frequency_penalty", "and this for each time it was said"),
        "alpha_decay": ("--alpha_decay", "--penalty_decay", "what is left of such a count after each token"),
    }
    for f in fields(Sampling):
        *names, text = texts[f.name]
        value = getattr(default, f.name)
        group.add_argument(*names, dest=f.name, type=f.type, default=value, help=f"{text} (default: {value})")
    group.add_argument("--seed", type=int, default=0, help="the same seed gives the same samples (default: 0)")
    text = f"prompts at once (default: {batch_size})"
    group.add_argument("--batch_size", type=int, default=batch_size, help=text)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(**{f.name: getattr(args, f.name) for f in fields(Sampling)})


@contextlib.contextmanager
def memory_advice(advice: str):
    """Say what to do where a GPU's memory does not suffice."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UserError(f"the GPU's memory is full; {advice}") from None


def read_prompts(path: str) -> list[str]:
    """Prompts of a file: .jsonl has {"prompt": ...} in each line, any other file one prompt a line."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--prompt_file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompt_file {path} is no UTF-8 text") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines:
        raise UserError(f"--prompt_file {path} holds no prompt")
    if not path.endswith(".jsonl"):
        return lines
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"--prompt_file {path}, prompt {number}: broken JSON: {error}") from None
        if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
            raise UserError(f'--prompt_file {path}, prompt {number}: wanted {{"prompt": TEXT}}')
        prompts.append(row["prompt"])
    return prompts


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="rwkv_bone.generate", description="Continue prompts, or chat, with an RWKV model.", allow_abbrev=False)
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt", action="append", default=[], help="text to continue; may be given several times")
    group.add_argument("--prompt_file", default="", help='a prompt a line, or .jsonl with {"prompt": ...} a line')
    group.add_argument("--instruct", action="store_true", help="put each prompt as a question, as in training")
    group.add_argument("--chat", action="store_true", help="talk to the model on the terminal")
    group.add_argument("--template", default="", metavar="world|g1|FILE", help="chat template (default: the one of training)")
    group.add_argument("--system", default="", help="system message, with --instruct and --chat")
    group.add_argument("--input", default="", help="text that the instruction is about, with --instruct (Alpaca's input)")
    group.add_argument("--samples", type=int, default=1, help="continuations of each prompt (default: 1)")
    group.add_argument("--max_tokens", type=int, default=256, help="longest continuation, in tokens (default: 256)")
    group.add_argument("--stop", action="append", default=[], help="text that ends a continuation; may be given several times")
    group.add_argument("--out", default="", metavar="F.jsonl", help="write prompts and continuations there, not to the terminal")
    group.add_argument("--overwrite", action="store_true", help="replace --out if it exists")
    add_sampling_flags(parser, DEFAULT)
    add_model_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    sampling = sampling_of(args)
    prompts = args.prompt + (read_prompts(args.prompt_file) if args.prompt_file else [])
    if args.chat == bool(prompts):
        raise UserError("give --prompt or --prompt_file, or --chat" if not prompts else "--chat takes no prompts")
    if args.samples < 1 or args.max_tokens < 1:
        raise UserError(f"--samples {args.samples} and --max_tokens {args.max_tokens} must be at least 1")
    if args.out and os.path.exists(args.out) and not args.overwrite:
        raise UserError(f"--out {args.out} exists; give another name, or --overwrite")
    model = open_model(args)
    tokenizer = tokenizer_of(args, model)
    template = template_of(args, model)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    with memory_advice("take a smaller --batch_size, or --device cpu"):
        if args.chat:
            chat(model, tokenizer, template, sampling, args.max_tokens, args.seed, args.system)
            return
        asked = [prompt for prompt in prompts for _ in range(args.samples)]
        stop, texts = tuple(args.stop), list[Any](asked)
        if args.instruct:
            stop, texts = stop + template.stops, as_asked(template, tokenizer, asked, args.system, args.input)
        alone = len(asked) == 1 and not args.out
        each = completions(
            model, tokenizer, texts, sampling, args.max_tokens, stop, args.seed, args.batch_size,
            on_text=shower(args.instruct) if alone else None,
        )  # fmt: skip
        if args.instruct:  # the space after "Assistant:" is the template's
            each = (replace(completion, text=completion.text.lstrip()) for completion in each)
        if alone:
            list(each)
            print()
        elif args.out:
            write(args.out, asked, each)
        else:
            print_in_order(asked, each)


def shower(strip: bool) -> Callable[[int, str], None]:
    """Prints each piece as it comes; `strip`: without the space before the first word."""
    begun = not strip

    def show(index: int, piece: str) -> None:
        nonlocal begun
        piece = piece if begun else piece.lstrip()
        begun = begun or bool(piece)
        print(piece, end="", flush=True)

    return show


def print_in_order(prompts: list[str], each: Iterator[Completion]) -> None:
    ready: dict[int, Completion] = {}
    shown = 0
    for completion in each:
        ready[completion.index] = completion
        while shown in ready:
            print(f"--- {shown + 1} of {len(prompts)}: {prompts[shown]}\n{ready.pop(shown).text}", flush=True)
            shown += 1


def write(path: str, prompts: list[str], each: Iterator[Completion]) -> None:
    with atomic(path) as file:
        for c in sorted(each, key=lambda c: c.index):
            line = {"prompt": prompts[c.index], "text": c.text, "tokens": len(c.tokens), "reason": c.reason}
            file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
    print(f"{len(prompts)} continuations in {path}")
