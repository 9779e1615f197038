"""merge.py's body: base + adapters -> one standard model file, tensor by tensor.

Each tensor is read, changed in float32, rounded once to its dtype and written before the next one is read, so that memory is
bounded by the largest tensor. Several adapters are applied in order, each to the merge of those before it, on which it must have
been trained: the result is bit for bit that of merging one by one.
"""

import argparse
import copy
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import Parser, UserError
from ..files.adapters import Adapter, load_adapter, save_adapter
from ..files.atomic import atomic
from ..files.models import combine, fingerprint, load_model, open_model, sample
from ..files.pth import Layout, Streamed, open_tensors, write_pth
from ..files.safetensors import is_safetensors, write_safetensors
from ..interop import hf_peft as hf
from ..interop import web_rwkv
from ..interop.rwkv_peft import UNAIDED, Foreign
from ..models.x060 import RWKV
from ..peft import PROJECTIONS, TRAIN_PARTS, merge, quant
from ..peft.adapter import matches
from ..terminal import Progress
from .as_lora import as_lora

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PIECE = 1 << 20  # entries looked at together where effects are summed up


# ---------------------------------------------------------------- what merging did


@dataclass
class Effect:
    """What an adapter did to a part of the model: squares summed over the entries, and counts of them."""

    tensors: int = 0
    weight: float = 0.0
    update: float = 0.0
    lost: float = 0.0  # of the difference between the rounded tensor and the exact one
    moved: int = 0  # entries with an update that is not 0
    vanished: int = 0  # those of them that rounding put back

    def add(self, before: Tensor, exact: Tensor, rounded: Tensor) -> None:
        self.tensors += 1
        for b, e, r in zip(*(t.reshape(-1).split(PIECE) for t in (before, exact, rounded))):
            update = e.float() - b.float()
            moved = update != 0
            self.weight += square(b.float())
            self.update += square(update)
            self.lost += square(r.float() - e.float())
            self.moved += int(moved.sum())
            self.vanished += int((moved & (r == b.to(r.dtype))).sum())

    def __add__(self, other: "Effect") -> "Effect":
        return Effect(*(a + b for a, b in zip(vars(self).values(), vars(other).values())))

    def __str__(self) -> str:
        size = "new" if self.update and not self.weight else f"{ratio(self.update, self.weight):.3%}"  # an initial state
        return (
            f"{self.tensors:7} {size:>12} {ratio(self.lost, self.update):12.3%} "
            f"{self.vanished / max(self.moved, 1):12.3%}"
        )


def square(x: Tensor) -> float:
    return torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2


def ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0


def part_of(name: str) -> str:
    """`att.key`, ..., or what `--train_parts` calls it."""
    named = [part for part, holds in TRAIN_PARTS.items() if holds(name)]
    return named[0] if named else re.sub(r"^blocks\.\d+\.|\.weight$", "", name)


# ---------------------------------------------------------------- merging


@dataclass(frozen=True)
class Options:
    foreign: Foreign = UNAIDED
    dtype: torch.dtype | None = None  # to write; None: each tensor's own
    device: str = "cpu"
    force: bool = False
    quant: str = "none"  # merge onto what training with that --quant saw


class Merge:
    """A base and its adapters, opened and checked; `tensors()` does the work as it is drawn upon."""

    def __init__(self, base: Path, adapters: list[Path], options: Options = Options()):
        self.base_path, self.options = base, options
        self.sizes, tensors = open_model(base)
        self.fingerprint = fingerprint(tensors)
        self.adapters = [Adapter(path, self.sizes, options.foreign) for path in adapters]
        self.effects: list[dict[str, Effect]] = [{} for _ in adapters]  # of each adapter, by part
        self.check_bases()
        self.layout = self.make_layout(tensors)
        self.dtype = tensors["emb.weight"].dtype
        del tensors
        self.base = Streamed(lambda: open_tensors(base))

    def check_bases(self) -> None:
        """What can be known before the work: the first adapter's base is this one, the others' is not."""
        if self.options.force:
            return
        for adapter in self.adapters[:1]:
            adapter.check_base(self.fingerprint)
        for adapter in self.adapters[1:]:
            if adapter.info["base"].get("fingerprint") == self.fingerprint:
                raise UserError(
                    f"{adapter.path}: was trained on the base itself, not on its merge with {self.adapters[0].path}, where it "
                    f"would not do what it was trained to do; --force merges it all the same"
                )

    def make_layout(self, tensors: Mapping[str, Tensor]) -> Layout:
        """The base's tensors in its order, with an initial state for each layer if an adapter brings one."""
        dtype = self.options.dtype
        layout = {name: (dtype or t.dtype, tuple(t.shape)) for name, t in tensors.items()}
        states = any(name.endswith(".time_state") for adapter in self.adapters for name in adapter.parts)
        if states and not self.sizes.time_state:
            like, _ = layout["emb.weight"]
            shapes = replace(self.sizes, time_state=True).shapes()
            layout = {name: layout.get(name, (like, shape)) for name, shape in shapes.items()}
        return layout

    @torch.no_grad()
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, merged tensor), in the layout's order and dtypes."""
        met: list[list[str]] = [[] for _ in self.adapters]  # samples of the model that each adapter meets
        for name, (dtype, shape) in self.layout.items():
            there = name in self.base
            tensor = self.dequantised(name, self.base[name]) if there else torch.zeros(shape, dtype=self.dtype)
            own = tensor.dtype
            for i, adapter in enumerate(self.adapters):
                if there:
                    met[i].append(sample(name, tensor))
                if adapter.changes(name):
                    tensor = self.changed(i, name, tensor, dtype if i == len(self.adapters) - 1 else own)
                    there = True
            yield name, tensor if tensor.dtype == dtype else converted(tensor, dtype, name, self.base_path)
        for adapter, samples in zip(self.adapters[1:], met[1:]):
            adapter.check_base(combine(samples), self.options.force)

    def dequantised(self, name: str, tensor: Tensor) -> Tensor:
        """The base's tensor as training saw it: a projection that was quantised there, quantised and made dense again."""
        if self.options.quant == "none" or not (name.endswith(".weight") and matches(name, PROJECTIONS) and tensor.dim() == 2):
            return tensor
        return quant.quantise(tensor.to(self.options.device), self.options.quant).dense().cpu()

    def changed(self, i: int, name: str, before: Tensor, dtype: torch.dtype) -> Tensor:
        """The tensor after adapter i, rounded to `dtype`, on the CPU."""
        before = before.to(self.options.device)
        exact = self.adapters[i].merged(name, before)
        after = converted(exact, dtype, name, self.adapters[i].path)
        self.effects[i].setdefault(part_of(name), Effect()).add(before, exact, after)
        return after.cpu()

    def report(self) -> str:
        """What each adapter did, by part."""
        lines = []
        for adapter, effects in zip(self.adapters, self.effects):
            total = sum(effects.values(), Effect())
            lines.append(f"changed    {total.tensors} of {len(self.layout)} tensors by {adapter.path}")
            lines.append(f"           {'part':16} tensors       update         lost      unmoved")
            lines += [f"           {part:16} {effect}" for part, effect in effects.items()]
            lines.append(f"           {'all':16} {total}")
        if lines:
            lines.append("           update: its size, relative to the weight's; lost: size of the rounding error, relative to")
            lines.append("           the update's; unmoved: share of the entries with an update that rounding put back")
        for adapter, effects in zip(self.adapters, self.effects):
            total = sum(effects.values(), Effect())
            if total.lost > total.update / 4:  # of squares: half of the size
                share = ratio(total.lost, total.update)
                lines.append(f"note       rounding took {share:.0%} of {adapter.path}'s update; --dtype fp32 keeps it")
        return "\n".join(lines)


def converted(tensor: Tensor, dtype: torch.dtype, name: str, source: Path) -> Tensor:
    """The tensor in the dtype to write; UserError if it does not survive that."""
    result = tensor.to(dtype)
    if not finite(result):
        if finite(tensor):
            raise UserError(f"{source}: {name} reaches {tensor.abs().max():.4g}, beyond {dtype}; use --dtype bf16 or fp32")
        raise UserError(f"{source}: {name} holds NaN or infinity; the training diverged")
    return result


def finite(tensor: Tensor) -> bool:
    return all(x.isfinite() for x in tensor.aminmax())


def write(path: Path, format: str, layout: Layout, tensors: Iterator[tuple[str, Tensor]]) -> None:
    if format == "pth":
        write_pth(path, layout, tensors)
        return
    renamed = {web_rwkv.web_name(name): (dtype, web_rwkv.web_shape(name, shape)) for name, (dtype, shape) in layout.items()}
    with atomic(path) as file:
        write_safetensors(file, renamed, ((web_rwkv.web_name(name), web_rwkv.web_tensor(name, t)) for name, t in tensors))


def shown(tensors: Iterator[tuple[str, Tensor]], size: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors, while stdout shows how many of their `size` bytes are done."""
    done = 0
    with Progress(size, unit="B", label="merging   ", stream=sys.stdout, leave=False) as progress:
        for name, tensor in tensors:
            yield name, tensor
            done += tensor.nbytes
            progress.update(done)


# ---------------------------------------------------------------- verifying


def adapted_model(job: Merge) -> RWKV:
    """Base and adapters as they are used without merging; those before the last are merged and rounded, as the last met them."""
    model = load_model(job.base_path)
    for name, parameter in model.named_parameters():
        parameter.data = job.dequantised(name, parameter.data)
    for i, adapter in enumerate(job.adapters):
        if i > 0:
            merge(model)
            model.fingerprint = fingerprint(model.state_dict())
        load_adapter(model, adapter.path, job.options.force, job.options.foreign)
    return model


@torch.no_grad()
def logits(model: RWKV, idx: Tensor) -> Tensor:
    """(T, V) of one sequence, computed in float32; a block at a time, so that a model in bf16 is never held in float32."""
    x = model.emb(idx).float()
    for block in model.blocks:
        x, _ = copy.deepcopy(block).float()(x, None, None, "torch")
    return copy.deepcopy(model.head).float()(copy.deepcopy(model.ln_out).float()(x))[0]


def verify(job: Merge, output: Path) -> str:
    """Compare base + adapters with the written file, on 32 tokens from all over the vocabulary."""
    idx = (torch.arange(1, 33) * 7919 % job.sizes.vocab_size)[None]
    base, adapted, merged = (logits(model, idx) for model in (load_model(job.base_path), adapted_model(job), load_model(output)))
    same = int((adapted.argmax(1) == merged.argmax(1)).sum())
    return (
        f"verified   logits of the written file are within {(merged - adapted).abs().max():.3g} of base + adapter's, which are "
        f"up to {(adapted - base).abs().max():.3g} from the base's; same next token at {same} of {idx.shape[1]} positions"
    )


# ---------------------------------------------------------------- the command


def make_parser() -> Parser:
    parser = Parser(
        prog="merge.py",
        description="Merge adapters into a base model: a standard RWKV-6 file with the base's names, order, shapes and dtypes.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--base_model", required=True, metavar="FILE", help="RWKV-6 .pth, or web-rwkv's safetensors")
    add("--peft_checkpoint", "--lora_checkpoint", "--state_checkpoint", nargs="+", default=[], metavar="FILE",
        help="adapters in the order of their training, ours or RWKV-PEFT's; none: only change dtype or format")  # fmt: skip
    add("--output", required=True, metavar="FILE", help="what to write; it appears when it is whole")
    add("--overwrite", action="store_true", help="replace --output if it exists")
    add("--force", action="store_true", help="merge an adapter into another base than it was trained on")
    add("--verify", action="store_true", help="compare logits of base + adapter with those of the written file")
    add("--dtype", choices=tuple(DTYPES), help="of all tensors (default: the base's own; fp16 in safetensors)")
    add("--format", choices=("pth", "safetensors"), help="safetensors: with web-rwkv's names (default: by the name of --output)")
    add("--device", default="cpu", help="where to compute: cpu or cuda (default: cpu)")
    add("--as", dest="as_", choices=("lora", "peft"),
        help="write an adapter instead: a LoRA (exact where the method is one, else by SVD), or a folder of peft")  # fmt: skip
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
    check_output(output, inputs, args.overwrite, folder=args.as_ == "peft")
    format = args.format or ("safetensors" if output.suffix in (".st", ".safetensors") else "pth")
    dtype = DTYPES[args.dtype] if args.dtype else web_rwkv.DTYPE if format == "safetensors" else None
    options = Options(Foreign(args.lora_alpha, args.lora_init, args.type or ""), dtype, args.device, args.force, args.quant)
    check_device(args.device)
    check_combination(args, format)
    job = Merge(Path(args.base_model), [Path(path) for path in args.peft_checkpoint], options)
    sizes = job.sizes
    print(f"base       {job.base_path}: RWKV-6, {sizes.n_layer} layers, n_embd {sizes.n_embd}, vocabulary {sizes.vocab_size}")
    if args.quant != "none":
        print(f"           its projections of {' and '.join(PROJECTIONS)} as they are in {args.quant}, dequantised")
    for adapter in job.adapters:
        check_claims(adapter, args)
        print(f"adapter    {adapter.path}: {description(adapter)}")
    for adapter in job.adapters[:1]:  # the others' base is no file that --quant could be of
        kind = adapter.info.get("quant")
        if kind in list(quant.KINDS) and args.quant == "none" and not args.as_:
            print(f"note       {adapter.path} was trained on an {kind} base, and its update goes onto the full weights; "
                  f"--quant {kind} puts it onto the dequantised base")  # fmt: skip
    if args.as_:
        print(write_lora(job, output, args.rank) if args.as_ == "lora" else write_peft(job, output))
        return 0
    began = time.monotonic()
    size = sum(math.prod(shape) * dtype.itemsize for dtype, shape in job.layout.values())
    write(output, format, job.layout, shown(job.tensors(), size))
    if job.adapters:
        print(job.report())
    dtypes = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype, _ in job.layout.values()}))
    took = time.monotonic() - began
    print(f"written    {output}: {format}, {len(job.layout)} tensors, {dtypes}, {size / 2**20:,.1f} MiB, in {took:.1f} s")
    if args.verify:
        print(verify(job, output))
    return 0


def write_lora(job: Merge, output: Path, rank: int) -> str:
    """Write the job's adapter as a LoRA; return what was lost."""
    adapter = job.adapters[0]
    tensors, rank, sizes = as_lora(adapter, job.base, rank, job.options.device)
    base = {"file": job.base_path.name, "fingerprint": job.fingerprint, "sizes": asdict(job.sizes)}
    info = {"method": "lora", "options": {"r": rank, "alpha": float(rank)}, "base": base, "made_from": adapter.path.name}
    info |= {key: adapter.info[key] for key in ("tokenizer", "quant") if key in adapter.info}
    save_adapter(output, tensors, info)
    parts: dict[str, list[float]] = {}
    for name, (update, missing) in sizes.items():
        squares = parts.setdefault(part_of(name), [0.0, 0.0])
        squares[0] += update**2
        squares[1] += missing**2
    lines = [f"written    {output}: LoRA, r = alpha = {rank}, {len(sizes)} projections", f"           {'part':16} missing"]
    parts["all"] = [sum(column) for column in zip(*parts.values())]
    lines += [f"           {part:16} {ratio(missing, update):.3%}" for part, (update, missing) in parts.items()]
    return "\n".join([*lines, "           missing: size of what the LoRA lacks of the update, relative to the update's"])


def write_peft(job: Merge, output: Path) -> str:
    adapter = job.adapters[0]
    hf.write_folder(output, adapter.tensors, adapter.info)
    return f"written    {output}: {adapter.info['method']} as a folder of peft, {len(adapter.layers)} projections"


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
    if not args.as_:
        if args.rank:
            raise UserError("--rank is for --as lora")
        from_format = "safetensors" if os.path.isfile(args.base_model) and is_safetensors(args.base_model) else "pth"
        if not args.peft_checkpoint and not args.dtype and format == from_format:
            raise UserError("nothing to do: give --peft_checkpoint, or another --dtype or --format than the base's")
        return
    if len(args.peft_checkpoint) != 1:
        raise UserError(f"--as {args.as_} is made of one adapter, and {len(args.peft_checkpoint)} are given")
    if args.rank < 0:
        raise UserError(f"--rank must be at least 1, not {args.rank}")
    if args.rank and args.as_ != "lora":
        raise UserError("--rank is for --as lora")
    if args.dtype or args.format or args.verify or args.quant != "none":
        raise UserError(f"--as {args.as_} writes an adapter: --dtype, --format, --quant and --verify are for models")


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
    words.append(f"{len(adapter.layers)} projections, {len(adapter.parts)} tensors trained in full")
    if "step" in info:
        words.append(f"after step {info['step']}")
    words.append(f"of {info['foreign']}, on an unknown base" if "foreign" in info else f"on {info['base'].get('file', 'a base')}")
    return ", ".join(words)
