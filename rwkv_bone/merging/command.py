"""merge.py's body: the command line, what it refuses, and what it prints. The work is in merge.py, write.py and verify.py."""

import argparse
import os
import time
from pathlib import Path

import torch

from ..errors import Parser, UserError
from ..files.adapters import Adapter
from ..files.models import reads_as_folder
from ..files.safetensors import is_safetensors
from ..interop import web_rwkv
from ..interop.rwkv_peft import Foreign
from ..peft import quant
from ..terminal import counted, fitted
from .merge import Merge, Options
from .verify import verify
from .write import FORMATS, STATE_INSIDE, gguf_plan, web_names, write_lora, write_model, write_peft, write_state

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SUFFIXES = {".st": "safetensors", ".safetensors": "safetensors", ".gguf": "gguf"}


def make_parser() -> Parser:
    parser = Parser(
        prog="merge.py",
        description="Merge adapters into a base model: a standard model with the base's files, names, order, shapes and dtypes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base_model", required=True, metavar="FILE",
        help="a model's .pth, web-rwkv's safetensors, a folder of Hugging Face, or a .gguf")  # fmt: skip
    add("--peft_checkpoint", "--lora_checkpoint", "--state_checkpoint", nargs="+", default=[], metavar="FILE",
        help="adapters in the order of their training, ours or RWKV-PEFT's; none: only change dtype or format")  # fmt: skip
    add("--output", required=True, metavar="FILE", help="what to write; it appears when it is whole")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--force", action="store_true", help="merge an adapter into another base than it was trained on")
    add("--verify", action="store_true", help="compare logits of base + adapter with those of the written file")
    add("--dtype", choices=(*DTYPES, "q8_0"), help="of all tensors (default: the base's own; fp16 in safetensors and gguf); "
        "q8_0: 8 bits, in gguf alone")  # fmt: skip
    add("--format", choices=FORMATS, help="safetensors: with web-rwkv's names; gguf: for llama.cpp, Ollama, LM Studio (package "
        "gguf); default: by the name of --output")  # fmt: skip
    add("--device", default="cpu", help="where to compute: cpu or cuda (default: cpu)")
    add("--as", dest="as_", choices=("lora", "peft", "state"),
        help="write an adapter instead: a LoRA (exact where the method is one, else by SVD), a folder of peft, or the trained "
        "initial state as other programs read it (state.pth, state.st)")  # fmt: skip
    add("--rank", type=int, default=0, help="rank of --as lora (default: the adapter's own)")
    add("--lora_alpha", type=float, help="alpha of RWKV-PEFT's LoRA files, which do not say it")
    add("--lora_init", "--pissa_init", default="", metavar="FILE", help="init_pissa.pth of RWKV-PEFT's PiSSA; none: no such file")
    add("--type", help="RWKV-PEFT's name of the method; the file must hold that")
    add("--quant", choices=("none", *quant.KINDS), default="none",
        help="merge onto the base as training with this --quant saw it (default: none, onto the base itself)")  # fmt: skip
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    args.lora_init = "" if args.lora_init == "none" else args.lora_init  # RWKV-PEFT's default
    output = Path(args.output)
    inputs = [args.base_model, *args.peft_checkpoint, *filter(None, [args.lora_init])]
    folder = reads_as_folder(args.base_model)
    check_output(output, inputs, args.overwrite, folder=folder if not args.as_ else args.as_ == "peft")
    if folder and not args.as_ and (args.format or output.suffix in SUFFIXES):
        raise UserError(f"{args.base_model} is merged into a folder like it: leave --format out, and let --output name a folder")
    format = args.format or SUFFIXES.get(output.suffix, "pth")
    format = "folder" if folder and not args.as_ else format
    dtype = DTYPES.get(args.dtype, web_rwkv.DTYPE if format == "safetensors" else None)
    options = Options(Foreign(args.lora_alpha, args.lora_init, args.type or ""), dtype, args.device, args.force, args.quant)
    check_device(args.device)
    check_combination(args, format)
    job = Merge(Path(args.base_model), [Path(path) for path in args.peft_checkpoint], options)
    plan = None
    if format == "safetensors":
        web_names(job)
    if format == "gguf":
        plan = gguf_plan(job, args.dtype or "fp16")
    print(fitted(f"base       {job.base_path}: {job.model.describe()}"))
    if args.quant != "none":
        print(f"           its projections of {' and '.join(job.kind.targets)} as they are in {args.quant}, dequantised")
    for adapter in job.adapters:
        check_claims(adapter, args)
        print(f"adapter    {adapter.path}: {description(adapter)}")
    for adapter in job.adapters[:1]:  # the others' base is no file that --quant could be of
        kind = adapter.info.get("quant")
        if kind in list(quant.KINDS) and args.quant == "none" and not args.as_:
            print(f"note       {adapter.path} was trained on an {kind} base, and its update goes onto the full weights; "
                  f"--quant {kind} puts it onto the dequantised base")  # fmt: skip
    if args.as_:
        match args.as_:
            case "lora":
                print(write_lora(job, output, args.rank))
            case "peft":
                print(write_peft(job, output))
            case "state":
                print(write_state(job, output, format))
        return 0
    began = time.monotonic()
    write_model(job, output, format, plan)
    if job.adapters:
        print(job.report())
        if plan and plan.type == "q8_0":
            print("note       lost and unchanged are those of float32; what is rounded to 8 bits loses more")
    dtypes = plan.types if plan else {str(dtype).removeprefix("torch.") for dtype, _ in job.layout.values()}
    count, took = len(plan.tensors if plan else job.layout), time.monotonic() - began
    size = sum(path.stat().st_size for path in (output.iterdir() if folder else [output])) / 2**20
    print(f"written    {output}: {format}, {count} tensors, {', '.join(sorted(dtypes))}, {size:,.1f} MiB, in {took:.1f} s")
    if job.initial_state:
        print(STATE_INSIDE)
    if args.verify:
        print(verify(job, output))
    return 0


# ---------------------------------------------------------------- what is refused


def check_output(output: Path, inputs: list[str], overwrite: bool, folder: bool = False) -> None:
    for path in inputs:
        same = os.path.exists(path) and output.exists() and os.path.samefile(path, output)
        if same or os.path.realpath(path) == os.path.realpath(output):
            raise UserError(f"--output {output} is {path} itself; give another name")
    if output.exists() and not (output.is_dir() if folder else output.is_file()):
        raise UserError(f"--output {output} is not a {'folder' if folder else 'file'}; give the name of one")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output} exists; give another name, or --overwrite")


def check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: this torch has no such device; use cpu or cuda") from None


def check_combination(args: argparse.Namespace, format: str) -> None:
    if args.dtype == "q8_0" and format != "gguf":
        raise UserError(f"--dtype q8_0 is a type of GGUF files: give --format gguf, or fp16 or bf16 for {format}")
    if args.verify and format == "gguf":
        raise UserError("--verify reads .pth and safetensors: leave it out with --format gguf")
    if args.as_ == "state" and format == "gguf":
        raise UserError("--as state: there are no GGUF files of states; give --output state.pth or state.st")
    if not args.as_:
        if args.rank:
            raise UserError("--rank is for --as lora")
        from_format = "safetensors" if os.path.isfile(args.base_model) and is_safetensors(args.base_model) else "pth"
        from_format = "folder" if os.path.isdir(args.base_model) else from_format
        if not args.peft_checkpoint and not args.dtype and format == from_format:
            raise UserError("nothing to do: give --peft_checkpoint, or another --dtype or --format than the base's")
        return
    if len(args.peft_checkpoint) != 1 and args.as_ != "state":
        raise UserError(f"--as {args.as_} is made of one adapter, and {len(args.peft_checkpoint)} are given")
    if args.rank < 0:
        raise UserError(f"--rank must be at least 1, not {args.rank}")
    if args.rank and args.as_ != "lora":
        raise UserError("--rank is for --as lora")
    for flag, given in {
        "dtype": args.dtype and args.as_ != "state",
        "format": args.format and args.as_ != "state",
        "verify": args.verify,
        "quant": args.quant != "none",
    }.items():
        if given:
            raise UserError(f"--as {args.as_} writes an adapter: leave --{flag} out, which is for models")


TYPES = {"bone": ("bone", "miss"), "disha": ("bone", "miss"), "state": ("none",)}  # RWKV-PEFT's name -> methods; others: the same


def check_claims(adapter: Adapter, args: argparse.Namespace) -> None:
    """What the command line says of an adapter must be what its file says."""
    method = adapter.info["method"]
    if args.type and method not in TYPES.get(args.type, (args.type,)):
        raise UserError(f"{adapter.path}: holds {method}, not --type {args.type}")
    if args.lora_init and "foreign" not in adapter.info:
        raise UserError(f"{adapter.path}: holds itself how it started; leave --lora_init out")
    if args.lora_alpha is not None and args.lora_alpha != (alpha := getattr(adapter.config, "alpha", None)):
        says = "has no alpha" if alpha is None else f"has alpha {alpha:g}"
        raise UserError(f"{adapter.path}: {method} {says}; leave --lora_alpha {args.lora_alpha:g} out")


def description(adapter: Adapter) -> str:
    """An adapter in a line."""
    info = adapter.info
    options = ", ".join(f"{name} {value}" for name, value in vars(adapter.config).items()) if adapter.config else ""
    words = [f"{info['method']} ({options})" if options else "parts of the base"]
    words += [counted(len(adapter.layers), "projection")] if adapter.layers else []
    words += [f"{counted(len(adapter.parts), 'tensor')} trained in full"] if adapter.parts else []
    if "step" in info:
        words.append(f"after step {info['step']}")
    words.append(f"of {info['foreign']}, on an unknown base" if "foreign" in info else f"on {info['base'].get('file', 'a base')}")
    return ", ".join(words)
