"""The command line of train.py as one frozen dataclass: every flag and its meaning.

What a file knows (sizes of the model, dtype of the data) no flag asks; where such a flag is given, it must agree with the file.
Command lines of RWKV-PEFT, RWKV-LM and RWKV-Runner are read by interop/rwkv_peft_flags.py, which puts them into these words.
"""

import argparse
import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .data.documents import DATA_TYPES
from .data.samples import DATALOADS
from .errors import Parser, UserError, checked, hint
from .interop.rwkv_peft_flags import read_command_line
from .models import MODELS
from .peft import METHODS
from .peft.quant import KINDS

PRECISIONS = {
    "auto": "auto",
    "bf16": "bf16",
    "bf16-true": "bf16",
    "bf16-mixed": "bf16",
    "fp32": "fp32",
    "32": "fp32",
    "32-true": "fp32",
    "tf32": "tf32",
}
STRATEGIES = ("auto", "ddp", *(f"deepspeed_stage_{s}" for s in ("1", "2", "2_offload", "3", "3_offload")))
SCHEDULES = ("exp", "linear", "cos", "warmup_cos", "wsd", "constant")
OPS = ("auto", "cuda", "cpu", "torch", "fla", "triton")  # triton, RWKV-PEFT's name, is fla here

AT_LEAST = {
    1: "ctx_len micro_bsz accumulate_grad_batches epoch_count num_nodes epoch_save keep_last head_size_a chunk_ctx",
    0: "vocab_size n_layer n_embd dim_att dim_ffn epoch_begin epoch_steps warmup_steps save_every_steps save_every_minutes "
    "weight_decay grad_clip adam_eps threads val_every patience sample_every keep_adapters",
}


def flag(default: Any, group: str, help: str, choices=None, **more) -> Any:
    """A field of the configuration that is a flag of the command line. A list's default is given as a tuple."""
    return field(default=default, metadata={"group": group, "help": help, "choices": choices, **more})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Each field is the flag `--name`; sizes of 0 mean "as the file has it", or the default of a new model."""

    load_model: str = flag("", "model", '.pth, folder or .gguf to train; "": a new model of --n_layer, --n_embd, --vocab_size')
    my_testing: str = flag("", "model", f"version of the model: {', '.join(MODELS)}; the file says it, a new one is the first")
    vocab_size: int = flag(0, "model", "vocabulary; checked against the file")
    n_layer: int = flag(0, "model", "layers; checked against the file")
    n_embd: int = flag(0, "model", "embedding size; checked against the file")
    dim_att: int = flag(0, "model", "time-mix size; checked against the file")
    dim_ffn: int = flag(0, "model", "channel-mix size; checked against the file")
    head_size_a: int = flag(64, "model", "head size of a new model")
    quant: str = flag("none", "model", "keep the base's projections in 8 or 4 bits", choices=("none", *KINDS))
    op: str = flag("auto", "model", "WKV kernel; torch needs no compiler, fla is flash-linear-attention's (GPU)", choices=OPS)

    data_file: str = flag("", "data", ".jsonl, .json, .csv, .parquet or .txt files (commas, globs, folders), or a binidx prefix")
    data_type: str = flag("auto", "data", "what data_file is; auto: by its ending", choices=("auto", *DATA_TYPES))
    ctx_len: int = flag(512, "data", "longest piece of a document in one sample, in tokens")
    dataload: str = flag(
        "pad",
        "data",
        "samples: pad (a document each, cut), only (one a batch), get (RWKV-LM's random slices), "
        "chunk (long documents in pieces, nothing cut), pack (short documents share a row)",
        choices=DATALOADS,
    )
    loss_mask: str = flag(
        "answer",
        "data",
        "which tokens of a jsonl are trained: answer (of pairs and chats; all of plain text), all or pad (every real token)",
        choices=("answer", "all", "pad", "none"),
    )
    loss_marks: tuple[str, ...] = ()  # loss_mask "marked", RWKV-PEFT's qa and se: trained from the first text up to the second
    data_rows: str = flag("", "data", "rows of data_file to use, FIRST:LAST, as in :1000")
    data_shuffle: bool = flag(True, "data", "new order in each epoch")
    tokenizer: str = flag("auto", "data", "for jsonl: auto (by vocabulary size), byte, world, or a tokenizer.json")
    vocab_file: str = flag("", "data", "another vocabulary in the format of World's")
    fields: str = flag("", "data", "for jsonl: names of its fields, as in question=problem,answer=solution")
    template: str = flag("", "data", "for rows: world, g1 or a jinja2 file; default: the model's own")
    format: str = flag("auto", "data", "for jsonl whose rows can be read in two ways: text, messages, question, ...")
    encoding: str = flag("utf-8", "data", "text encoding of the byte tokenizer", choices=("utf-8", "utf-16-le"))

    val_file: str = flag("", "data", "held-out data of the same kind: its loss is measured while training")
    val_split: float = flag(0.0, "data", "or the share of data_file's documents to hold out, spread evenly over it")

    peft: str = flag("bone", "method", f"{', '.join(METHODS)}, or none: the whole model trains")
    parts: tuple[str, ...] = flag((), "method", "layers that get an adapter: att, ffn, att.key, ...; default: all projections")
    train_parts: tuple[str, ...] = flag((), "method", "parts trained in full beside it: emb, head, time, ln")
    peft_checkpoint: str = flag("", "method", "adapter .pth to start from")
    peft_init: str = flag("", "method", "with a PiSSA of RWKV-PEFT as --peft_checkpoint: its file of A and B as they started")
    peft_options: dict[str, Any] = field(default_factory=dict)  # r, alpha, ...: a flag each, those that the method has

    micro_bsz: int = flag(8, "training", "samples a device takes at once")
    accumulate_grad_batches: int = flag(1, "training", "micro batches a step")
    epoch_count: int = flag(1, "training", "passes over the data")
    epoch_begin: int = flag(0, "training", "number of the first epoch, in file names")
    epoch_steps: int = flag(0, "training", "cap on the steps of an epoch; 0: all the data")
    lr_init: float = flag(-1.0, "training", "learning rate after the warm-up; -1: the one recommended for model and method")
    lr_final: float = flag(-1.0, "training", "learning rate at the end; -1: lr_init")
    lr_recommended: bool = False  # no lr_init was given: it is the recommended one
    repeat_data: bool = False  # an epoch is exactly epoch_steps steps: data that is shorter is read again
    lr_schedule: str = flag(
        "exp",
        "training",
        "from lr_init to lr_final; warmup_cos: linear warm-up from 0, then a cosine; wsd: falls in the last fifth",
        choices=SCHEDULES,
    )
    warmup_steps: int = flag(0, "training", "first steps, in which the rate rises from a fifth")
    layerwise_lr: int = flag(1, "training", "1: the model's own multiples of the rate (RWKV: the decay's is doubled)")
    objective: str = flag("text", "training", "what is trained for; text: the next token")
    optim: str = flag("adamw", "training", "optimiser")
    beta1: float = flag(0.9, "training", "Adam")
    beta2: float = flag(0.99, "training", "Adam")
    adam_eps: float = flag(1e-8, "training", "Adam")
    weight_decay: float = flag(0.0, "training", "weight decay, on matrices only")
    grad_clip: float = flag(1.0, "training", "largest gradient norm; 0: no clipping")
    val_every: int = flag(0, "training", "steps between two validations; 0: at the end of each epoch")
    val_first: bool = flag(False, "training", "measure the held-out loss before the first step, too")
    patience: int = flag(0, "training", "end the run after so many validations without a better one; 0: never")
    sample_prompt: tuple[str, ...] = flag(
        (), "training", "questions that the model answers before the first step and at the end; may be given several times"
    )
    sample_every: int = flag(0, "training", "and every so many steps")
    train_type: str = flag(
        "none",
        "training",
        "infctx: samples of ctx_len in chunks of chunk_ctx with carried state; state: train each layer's initial state alone",
        choices=("none", "infctx", "state"),
    )
    chunk_ctx: int = flag(512, "training", "tokens of a chunk with --train_type infctx")
    truncate: bool = flag(False, "training", "infctx: no gradient across chunk borders; faster")
    l2wrap: bool | None = flag(None, "training", "RWKV's pull on each position's largest logit; default: RWKV models, not others")
    random_seed: int = flag(0, "training", "seed of data order, dropout and new tensors; -1: a new one each time")

    accelerator: str = flag("auto", "devices", "auto takes a GPU if there is one", choices=("auto", "gpu", "cuda", "cpu"))
    devices: str = flag("auto", "devices", "number of devices; auto: all GPUs, or one CPU process")
    num_nodes: int = flag(1, "devices", "machines")
    strategy: str = flag("auto", "devices", "engine", choices=STRATEGIES)
    precision: str = flag("auto", "devices", "auto: bf16 on GPUs, fp32 on CPU", choices=tuple(PRECISIONS))
    grad_cp: bool = flag(False, "devices", "recompute blocks in backward: less memory, about a third more time")
    threads: int = flag(0, "devices", "CPU threads; 0: torch's choice")

    proj_dir: str = flag("out", "output", "folder for adapters, checkpoints and logs")
    epoch_save: int = flag(1, "output", "write rwkv-N.pth every so many epochs; the last is always written")
    keep_adapters: int = flag(0, "output", "of the earlier rwkv-N.pth keep so many; best and last always stay; 0: all")
    save_every_steps: int = flag(0, "output", "write a step checkpoint every so many steps; 0: at the end of epochs only")
    save_every_minutes: float = flag(10.0, "output", "and every so many minutes; 0: never")
    keep_last: int = flag(2, "output", "step checkpoints to keep")
    resume: str = flag("", "output", "auto: continue from the newest checkpoint in proj_dir, or start if there is none")
    overwrite: bool = flag(False, "output", "start anew in a proj_dir that holds a run")
    tensorboard: bool = flag(False, "output", "log for TensorBoard too (package tensorboard)")
    wandb: str = flag("", "output", "log to this Weights & Biases project too (package wandb)")
    show_batch: bool = flag(False, "output", "print the first batch as text, what is trained marked, and end")
    dry_run: bool = flag(False, "output", "print what would happen, and end")
    notes: tuple[str, ...] = ()  # how another program's command line was read, for the person; () for our own

    def __post_init__(self):
        for low, names in AT_LEAST.items():
            for name in names.split():
                if not getattr(self, name) >= low:
                    raise UserError(f"--{name} must be at least {low}, not {getattr(self, name)}")
        for name in ("lr_init", "lr_final"):
            if not (getattr(self, name) >= 0 or getattr(self, name) == -1):
                raise UserError(f"--{name} must be at least 0, not {getattr(self, name)}; leave it out for the default")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} must be in [0, 1), not {getattr(self, name)}")
        if not self.data_file:
            raise UserError("--data_file is missing: .jsonl or other files of rows, or the prefix of a .bin/.idx pair")
        if not 0 <= self.val_split < 1:
            raise UserError(f"--val_split is a share, at least 0 and below 1, not {self.val_split}")
        if self.val_split and (self.val_file or self.dataload == "get"):
            raise UserError("--val_split holds documents of --data_file out: not with --val_file, and not with --dataload get")
        if (self.patience or self.val_every) and not (self.val_file or self.val_split):
            raise UserError("--val_every and --patience need held-out data: --val_file or --val_split")
        if self.val_first and not (self.val_file or self.val_split):
            raise UserError("--val_first needs held-out data: --val_file or --val_split")
        if self.sample_every and not self.sample_prompt:
            raise UserError('--sample_every needs what to ask: --sample_prompt "..."')
        if self.sample_prompt and self.strategy.startswith("deepspeed_stage_3"):
            raise UserError("--sample_prompt: stage 3 has no whole model on a device to ask; use deepspeed_stage_2")
        if self.data_rows and not re.fullmatch(r"\d*:\d*", self.data_rows):
            raise UserError(f"--data_rows takes FIRST:LAST, as in :1000 or 1000:2000, not {self.data_rows!r}")
        if self.resume not in ("", "auto"):
            raise UserError(f"--resume takes auto, not {self.resume!r}")
        if self.devices != "auto" and not re.fullmatch(r"[1-9][0-9]{0,5}", self.devices):
            raise UserError(f"--devices takes a number of devices or auto, not {self.devices!r}")
        if self.my_testing not in ("", *MODELS):
            raise UserError(f"--my_testing {self.my_testing}: unknown version; there are {', '.join(MODELS)}")
        if self.layerwise_lr not in (0, 1):
            raise UserError(f"--layerwise_lr takes 0 or 1, not {self.layerwise_lr}")
        if self.quant != "none" and self.peft == self.train_type == "none":
            raise UserError(f"--quant {self.quant} freezes the base: it takes a --peft other than none, or --train_type state")
        if self.train_type == "state" and (self.peft != "none" or not self.load_model):
            raise UserError("--train_type state trains each layer's initial state alone: it takes --load_model and no --peft")
        if self.train_type == "state" and self.dataload == "pack":
            raise UserError("--train_type state: where rows are packed, only their first document begins with the state; use pad")
        if self.peft == "none" and (self.train_parts or self.peft_options or self.peft_checkpoint):
            raise UserError("--peft none trains the whole model: --train_parts, --peft_checkpoint and options need a method")
        if self.peft not in ("none", *METHODS):
            near = difflib.get_close_matches(self.peft, METHODS, 1)
            raise UserError(f"--peft {self.peft}: unknown; there are none, {', '.join(METHODS)}" + hint(near))
        if self.peft != "none":
            try:  # refuses what the method does not have
                METHODS[self.peft].config_from(self.peft_options, self.peft)
            except UserError as error:
                raise UserError(f"--peft {self.peft}: {str(error).removeprefix(f'{self.peft}: ')}") from None
        if self.op == "fla" and self.accelerator == "cpu":
            raise UserError("--op fla: flash-linear-attention's kernels run on GPUs alone; leave --op out on a CPU")
        if self.op == "fla" and importlib.util.find_spec("fla") is None:
            cure = "pip install flash-linear-attention, or leave --op out: this program has kernels of its own"
            raise UserError(f"--op fla: flash-linear-attention is not installed; {cure}")

    @classmethod
    def from_argv(cls, argv: list[str] | None = None) -> "TrainConfig":
        """Parse a command line; UserError, in one line, for whatever it cannot take."""
        parser, method_options = make_parser()
        read = read_command_line(checked(sys.argv[1:] if argv is None else argv))
        given = vars(parser.parse_args(read.argv))
        for name in ("parts", "train_parts"):
            if name in given:
                given[name] = words(given[name])
        if "sample_prompt" in given:
            given["sample_prompt"] = tuple(given["sample_prompt"])
        given["peft_options"] = {name: given.pop(name) for name in method_options if name in given}
        if given.get("op") == "triton":
            given["op"] = "fla"
        given["precision"] = PRECISIONS[given.get("precision", "auto")]
        return cls(**{**given, **read.more}, notes=read.notes).with_rate()

    def with_rate(self, recommended: float = -1) -> "TrainConfig":
        """With the recommended rate where none was given, and lr_final where that is lr_init."""
        config = self
        if config.lr_init < 0 <= recommended:
            config = replace(config, lr_init=recommended, lr_recommended=True)
        return replace(config, lr_final=config.lr_init) if config.lr_final < 0 else config

    def wants_l2wrap(self, model: Any) -> bool:
        return model.l2wrap if self.l2wrap is None else self.l2wrap

    def to_json(self) -> str:
        return json.dumps({f.name: getattr(self, f.name) for f in fields(self)}, indent=1)


# What other trainers call them: for "did you mean".
ELSEWHERE: Mapping[str, str] = {
    "--learning_rate": "--lr_init",
    "--lr": "--lr_init",
    "--batch_size": "--micro_bsz",
    "--epochs": "--epoch_count",
    "--num_epochs": "--epoch_count",
    "--rank": "--r",
    "--lora_r": "--r",
    "--lora_alpha": "--alpha",
    "--model": "--load_model",
    "--base_model": "--load_model",
    "--data": "--data_file",
    "--output": "--proj_dir",
    "--output_dir": "--proj_dir",
    "--max_length": "--ctx_len",
    "--seed": "--random_seed",
    "--method": "--peft",
}


def make_parser() -> tuple[Parser, list[str]]:
    """The parser, and the names of the flags that are options of methods."""
    parser = Parser(
        prog="train.py",
        description="Fine-tune an RWKV model with Bone or another method, or train one in full.",
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
        epilog="Command lines of RWKV-PEFT and RWKV-LM (--lora, --my_testing, ...) are read too: see docs/rwkv-peft.md.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.elsewhere = ELSEWHERE
    groups = {name: parser.add_argument_group(name) for name in ("model", "data", "method", "training", "devices", "output")}
    for f in fields(TrainConfig):
        if "group" in f.metadata:
            add_flag(groups[f.metadata["group"]], f.name, f.default, f.metadata["help"], f.metadata["choices"])
    options: dict[str, tuple[Any, str, dict[str, Any]]] = {}
    for method, layer in METHODS.items():
        for f in fields(layer.Config):
            options.setdefault(f.name, (f.default, f.metadata.get("help", ""), {}))[2][method] = f.default
    for name, (default, text, of_method) in options.items():
        others = [method for method, value in of_method.items() if value != default]
        differs = f"; default of {', '.join(others)}: {of_method[others[0]]}" if others else ""
        add_flag(groups["method"], name, default, f"{text} [{', '.join(of_method)}]{differs}")
    return parser, list(options)


def add_flag(group, name: str, default: Any, text: str, choices=None) -> None:
    kind = type(default)
    shown = " ".join(default) if kind is tuple else int(default) if kind is bool else "" if default is None else default
    known = f" (default: {shown})" if shown not in ("", -1) else ""  # of others the text says what they mean
    more: dict[str, Any] = {"help": f"{text}{known}".replace("%", "%%")}
    if kind is bool or default is None:
        more.update(type=truth, nargs="?", const=True, metavar="0|1")
    elif kind is tuple:
        more.update(nargs="*", action="extend", metavar=name.upper().removesuffix("S"))
    else:
        more.update(type=kind, choices=choices, metavar=None if choices else kind.__name__.upper())
    group.add_argument(f"--{name}", **more)


def truth(text: str) -> bool:
    if text.lower() in ("1", "true", "yes"):
        return True
    if text.lower() in ("0", "false", "no"):
        return False
    raise argparse.ArgumentTypeError(f"takes 0 or 1, not {text!r}")


def words(values: list[str]) -> tuple[str, ...]:
    """Names given as words, with commas, or as a list in the scripts' way: `att ffn`, `att,ffn`, `[]`, `["time", "ln"]`."""
    return tuple(word for value in values for word in value.translate(str.maketrans("[]\"',", "     ")).split())
