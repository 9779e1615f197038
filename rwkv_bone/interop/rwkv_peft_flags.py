"""Command lines of RWKV-PEFT, RWKV-LM and RWKV-Runner, read as command lines of this program.

`read_command_line` is all that the rest of the program knows of them. It does two things:

1. A flag or value that only they have is replaced by what it means here, in any command line: `--lora --lora_r 8`,
   `--bone_config JSON`, `--peft state`, `--data_type sft`, ... What means nothing here is dropped at the values that scripts pass
   and refused at any other. What cannot be honoured is refused by name, with the reason.
2. A command line is read as RWKV-PEFT's if it gives `--my_testing` or `--rwkv_version` (here only a new model, `--peft none`
   without `--load_model`, needs one), or a flag of SIGNS. Then what it leaves out has RWKV-PEFT's default, and what the same
   flag means there; `notes` says each of these once.

Sources: every train.py of github.com/JL-er/RWKV-PEFT and github.com/Joluck/RWKV-PEFT, November 2023 to January 2026.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..errors import UserError
from ..terminal import counted
from .rwkv_peft_methods import CONFIGS, INIT, LOAD, LORA, PARTS, PISSA, TODAY, method_from_community, parse

# ---------------------------------------------------------------- what means nothing here, and what cannot be done

HARMLESS: dict[str, tuple[str, ...]] = {  # taken at these values; () is a switch, or any value
    "pre_ffn": ("0",),
    "head_qk": ("0",),
    "tiny_att_dim": ("0",),
    "tiny_att_layer": ("-999",),
    "my_pile_version": ("1",),
    "my_pile_shift": ("-1", "0"),
    "my_pile_edecay": ("0",),
    "my_sample_len": ("0",),
    "my_ffn_shift": ("1",),
    "my_att_shift": ("1",),
    "my_pos_emb": ("0",),
    "my_qa_mask": ("0",),
    "my_random_steps": ("0",),
    "my_exit": ("99999999",),
    "load_partial": ("0",),
    "head_size_divisor": ("8",),
    "weight_decay_final": ("-1",),
    "dropout": ("0", "0.0"),
    "optimizer": ("none", "adam"),
    "avg_loss": ("0",),
    "l2warp_sparse": ("0",),
    "enable_progress_bar": (),
    "ds_bucket_mb": (),
    "num_workers": (),
    "prefetch_factor": (),
    "persistent_workers": (),
    "fla": (),
    "fused_kernel": (),
    "compile": (),
}

REFUSED: dict[str, Mapping[str, str] | str] = {  # flag -> why, or value -> why
    "LISA": "trains layers drawn at random, each for some steps, which this program has not; use a --peft method",
    "lisa_config": "is of LISA, which this program has not; use a --peft method",
    "fla-npu": "is of Ascend NPUs, which this program does not run on",
    "accelerator": {
        "xpu": "Intel GPUs are not supported; use gpu or cpu",
        "npu": "Ascend NPUs are not supported; use gpu or cpu",
    },
    "precision": {"fp16": "fp16 is not supported (small gradients vanish in it); use bf16, or fp32 where the device has no bf16"},
    "optim": {"adam_mini": "Adam-mini is not supported; leave the flag out for AdamW"},
    "quant": {
        "fp8": "weights in fp8 are not supported; use int8 or nf4",
        "fp4": "weights in fp4 are not supported; use nf4",
        "4bit": "say which 4 bits: nf4",
    },
    "peft": {
        "adalora": "AdaLoRA, which changes ranks while training, is not supported; use lora, pissa or bone",
        "prefix": "prefix tuning is not supported; --train_type state trains each layer's initial state, which does its work",
    },
    "train_type": {"fullstate": "training the whole model together with its states is not supported; use state, or none"},
}
OLD_VERSIONS = ("", "x051", "x051a", "x052", "r2r4", "r3r4", "5")
VERSIONS = {"6": "x060", "7": "x070"}  # RWKV-PEFT looks for the digit alone

# ---------------------------------------------------------------- the words of a command line

SEVERAL = ("--sample_prompt",)  # flags of which each one given counts

class Line:
    """A command line as its flags, in order, each with the words that follow it. Given twice, a flag counts as the last says."""

    def __init__(self, argv: Sequence[str]):
        self.before: list[str] = []  # words before the first flag
        self.flags: dict[str, list[str]] = {}  # --name -> its words, as given
        words = self.before
        for word in argv:
            if word.startswith("--") and len(word) > 2:
                name, equals, value = word.partition("=")
                words = self.flags[name] = (self.words(name[2:]) if name in SEVERAL else []) + ([value] if equals else [])
            else:
                words.append(word)

    def __contains__(self, name: str) -> bool:
        return f"--{name}" in self.flags

    def words(self, name: str) -> list[str]:
        return self.flags.get(f"--{name}", [])

    def value(self, name: str, default: str = "") -> str:
        """The one word of a flag; `default` where it is not given."""
        if name not in self:
            return default
        words = self.words(name)
        if len(words) != 1:
            raise UserError(f"--{name} takes one value, not {len(words)}" + (f": {' '.join(words)}" if words else ""))
        return words[0]

    def pop(self, name: str, default: str = "") -> str:
        value = self.value(name, default)
        self.drop(name)
        return value

    def drop(self, *names: str) -> None:
        for name in names:
            self.flags.pop(f"--{name}", None)

    def set(self, name: str, *words: str) -> None:
        self.flags[f"--{name}"] = list(words)

    def default(self, name: str, *words: str) -> bool:
        """Set what is not given; whether it was not."""
        missing = name not in self
        if missing:
            self.set(name, *words)
        return missing

    def join_json(self, name: str) -> None:
        """Put JSON that the shell cut at its blanks (an unquoted variable) together again."""
        words = self.words(name)
        if len(words) > 1 and words[0].startswith("{"):
            ends = [n for n in range(1, len(words) + 1) if is_json(" ".join(words[:n]))]
            n = ends[0] if ends else len(words)
            self.set(name, " ".join(words[:n]), *words[n:])

    def argv(self) -> list[str]:
        """The words again. One word that begins with a dash is joined to its flag, as argparse needs it."""
        words = list(self.before)
        for flag, values in self.flags.items():
            if flag in SEVERAL:
                words += [f"{flag}={value}" for value in values]
                continue
            words += [f"{flag}={values[0]}", *values[1:]] if values and values[0].startswith("-") else [flag, *values]
        return words


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


# ---------------------------------------------------------------- reading


class Reading(NamedTuple):
    argv: list[str]  # a command line of this program
    more: dict[str, Any]  # fields of the configuration that are no flags
    notes: tuple[str, ...]  # lines for the person: how it was read, the first one says by what sign; () for our own lines


SIGNS = {  # flags by which a command line is RWKV-PEFT's or RWKV-LM's
    **dict.fromkeys(("rwkv_version", "lora", "PISSA", "state_tune", "dataset_get", "datashuffle", "emb"), "first"),
    **dict.fromkeys(("my_testing", "mask_id", "sft_field", "sft_split", "my_pile_stage", "train_stage"), ""),
    **dict.fromkeys(("merge", "miss_config"), "today"),
}
DEFAULTS = {"ctx_len": "1024", "micro_bsz": "12", "lr_init": "6e-4", "lr_final": "1e-5", "epoch_save": "5", "random_seed": "-1"}
STAGE_STEPS = 40320  # samples of one epoch in RWKV-LM


def read_command_line(argv: Sequence[str]) -> Reading:
    """A command line in this program's words. UserError for what cannot be honoured."""
    line = Line(argv)
    for name in (*CONFIGS, "mask_id"):
        line.join_json(name)
    sign, era = sign_of(line)
    untold = not any(name in line for name in ("peft", "lora", "PISSA"))
    notes: list[str] = []
    more: dict[str, Any] = {}
    refuse(line)
    if "fla" in line:
        notes.append("--fla: this program's own kernels compute the same; --op fla runs those of flash-linear-attention")
    harmless(line)
    version(line)
    spellings(line)
    stages(line, notes)
    state(line)
    parts = method(line, sign, era, notes)
    data(line, era, more, notes)
    if sign:
        if untold and line.words("peft") == ["none"] and line.words("train_type") != ["state"]:
            notes.append("no --peft: the whole model trains")
        defaults(line, era, parts, more, notes)
        notes = [f"read as an RWKV-PEFT command line, because of --{sign}:", *notes]
    return Reading(line.argv(), more, tuple(notes) if sign else ())


def sign_of(line: Line) -> tuple[str, str]:
    """The flag by which the line is RWKV-PEFT's, or "", and its time: "first" (before October 2024), "" or "today" (from
    October 2025), as its flags show it."""
    new = line.words("peft") == ["none"] and not "".join(line.words("load_model"))
    found = [name for name in SIGNS if name in line and not (name == "my_testing" and new)]
    if line.words("peft") == ["state"]:
        found.append("peft state")
    if not found:
        return "", ""
    if any(SIGNS.get(name) == "first" for name in found):
        return found[0], "first"
    today = any(SIGNS.get(name) == "today" for name in found) or "peft_config" in line or line.words("peft") == ["state"]
    return found[0], "today" if today else ""


def refuse(line: Line) -> None:
    for name, why in REFUSED.items():
        if name in line:
            if isinstance(why, str):
                raise UserError(f"--{name} {why}")
            for value in line.words(name):
                if value in why:
                    raise UserError(f"--{name} {value}: {why[value]}")


def harmless(line: Line) -> None:
    for name, usual in HARMLESS.items():
        if name in line:
            value = line.value(name) if usual else ""
            if usual and value not in usual:
                raise UserError(f"--{name} {value}: has no meaning here and is taken only at its usual value {usual[0]}")
            line.drop(name)
    if line.words("optim") in (["none"], ["adam"]):  # their names of AdamW
        line.drop("optim")


def version(line: Line) -> None:
    if not {"rwkv_version", "my_testing"} & {flag[2:] for flag in line.flags}:
        return
    given = line.pop("rwkv_version") if "rwkv_version" in line else line.value("my_testing")
    given = given.strip("\"'")  # RWKV-Runner's scripts pass the quotes too
    given = VERSIONS.get(given, given)
    if given in OLD_VERSIONS:
        raise UserError(f"--my_testing {given or repr(given)}: is RWKV-5, which is not supported; x060 and x070 are")
    line.set("my_testing", given)


def spellings(line: Line) -> None:
    """Values that are written otherwise here."""
    if line.words("strategy") in (["single-device"], ["single_device"], ["single"]):
        line.set("strategy", "auto")
    if line.words("warmup_steps") == ["-1"]:
        line.set("warmup_steps", "0")
    if line.words("train_type") == ["finetune"]:
        line.drop("train_type")
    for theirs, ours in {"head_size": "head_size_a", "dataset_get": "dataload", "datashuffle": "data_shuffle"}.items():
        if theirs in line:
            line.set(ours, line.pop(theirs))
    if line.words("load_model") == ["0"]:
        line.set("load_model", "")


def stages(line: Line, notes: list[str]) -> None:
    """RWKV-LM's training from scratch: --my_pile_stage 1 makes initial weights, 2 and 3 train in epochs of 40,320 samples."""
    stage = line.pop("train_stage") if "train_stage" in line else line.value("my_pile_stage", "0")
    prime, tokens = line.pop("magic_prime", "0"), line.pop("my_exit_tokens", "0")
    line.drop("my_pile_stage")
    if stage == "0":
        if (prime, tokens) != ("0", "0"):
            raise UserError("--magic_prime and --my_exit_tokens are of --my_pile_stage 3, which is not given; leave them out")
        return
    if stage == "1":
        raise UserError(
            "--my_pile_stage 1 only writes initial weights, which are made here when training begins: run the next stage"
        )
    if stage not in ("2", "3") or whole(prime) < STAGE_STEPS:
        raise UserError(f"--my_pile_stage {stage} with --magic_prime {prime} is not supported; stage 3 with its magic prime is")
    batch = math.prod(
        whole(line.value(name, usual)) for name, usual in (("micro_bsz", "12"), ("devices", "1"), ("num_nodes", "1"))
    )
    if not batch or STAGE_STEPS % batch:
        raise UserError(
            f"--my_pile_stage {stage}: micro_bsz x devices x num_nodes = {batch} must divide {STAGE_STEPS}, as in RWKV-LM"
        )
    init = os.path.join(line.value("proj_dir", "out"), "rwkv-init.pth")
    line.set("load_model", init if os.path.isfile(init) else "")
    epochs, steps = whole(prime) // STAGE_STEPS, STAGE_STEPS // batch
    line.set("epoch_steps", str(steps))
    line.set("epoch_count", str(epochs))
    line.default("dataload", "get")
    line.default("lr_schedule", "cos")
    line.set("peft", "none")
    notes.append(
        f"--my_pile_stage {stage}: {epochs} epochs of {steps} steps, one pass over the data; the rate follows a cosine; "
        "--resume auto goes on with it"
    )


def state(line: Line) -> None:
    """State tuning: --state_tune, --peft state, --train_type state."""
    tunes = "state_tune" in line or line.words("peft") == ["state"] or line.words("train_type") == ["state"]
    line.drop("state_tune")
    if tunes:
        if line.words("peft") == ["state"]:
            line.drop("peft", "peft_config")
        line.set("train_type", "state")
        line.default("peft", "none")


def method(line: Line, sign: str, era: str, notes: list[str]) -> tuple[str, ...]:
    """Method, options, file to start from and parts in this program's flags; the parts that train in full beside, if given."""
    switches = [name for name in ("lora", "PISSA") if name in line]
    line.drop("lora", "PISSA")
    emb = ("emb", "head") if "emb" in line else ()
    line.drop("emb")
    if switches:
        line.set("peft", "pissa" if "PISSA" in switches else "lora")
    peft = line.value("peft", "none" if sign else "bone")
    configs = {name: line.pop(name) for name in CONFIGS if name in line}
    if sign:
        configs.update(usual_config(peft, configs, bool(switches), era))
    chosen = method_from_community(peft, configs)
    single: dict[str, Any] = {}  # flags of their own, of the first scripts
    if peft in ("lora", "rslora", "lora_plus", "dora", "pissa"):
        for name, (meaning, _) in {**LORA, **PISSA}.items():
            if name in line and name != "svd_niter":
                value = line.pop(name)
                if (value and value != "none") or meaning not in (LOAD, INIT):
                    single[meaning] = value
    parts = tuple(single.pop(PARTS, "att,ln,time" if switches else "").replace(",", " ").split()) or chosen.parts
    if peft == "pissa":
        for name in ("alpha", "lora_dropout"):  # which it does not use
            single.pop(name, None)
    load, init = single.pop(LOAD, chosen.load), single.pop(INIT, chosen.init)
    options = {**chosen.options, **single}
    if switches:
        usual = {"r": 8} if peft == "pissa" else {"r": 8, "alpha": 32.0, "lora_dropout": 0.01}
        options = {**usual, **options}
    if load in ("none", "None"):
        load = ""
    if load and sign and not load.endswith((".pth", ".safetensors")) and not os.path.exists(load):
        notes.append(f"{load}, the adapter to start from: no such file; the adapter starts anew, as it does there")
        load = ""
    if sign or configs or switches or "peft" in line:
        line.set("peft", chosen.method)
    for name, value in options.items():
        line.default(name, str(value))
    if load:
        line.default("peft_checkpoint", load)
    if init and "peft_checkpoint" in line:
        line.default("peft_init", init)
    adapted = tuple(part for part in parts if part not in ("time", "ln", "emb", "head"))
    in_full = tuple(part for part in parts if part not in adapted) + emb
    if adapted and set(adapted) != {"att", "ffn"}:
        line.default("parts", *adapted)
    elif era == "today" and chosen.method != "none" and not adapted and line.default("parts", *TODAY):
        notes.append(f"adapters are put on {', '.join(TODAY)}, as RWKV-PEFT does since October 2025 (--parts)")
    if in_full:
        line.default("train_parts", *in_full)
    return in_full


def usual_config(peft: str, configs: Mapping[str, str], switches: bool, era: str) -> dict[str, str]:
    """RWKV-PEFT's own default of a method's JSON where the line does not give one."""
    if configs or switches:
        return {}
    if era == "today":
        return {"peft_config": "{}"} if peft in ("lora", "miss") else {}
    usual = {
        "lora": ("lora_config", '{"lora_r":8, "lora_alpha":32, "lora_dropout":0.01}'),
        "pissa": ("pissa_config", '{"pissa_r":8, "svd_niter":4}'),
    }
    return dict([usual[peft]]) if peft in usual else {}


def data(line: Line, era: str, more: dict[str, Any], notes: list[str]) -> None:
    """Data sets of Hugging Face (--data_type sft), masks by marks in the text, --merge."""
    if line.words("data_type") == ["sft"]:
        names = line.words("sft_field")
        if len(names) != 2:
            raise UserError(f"--data_type sft: --sft_field names two fields, question and answer, not {len(names)}")
        file = line.value("data_file")
        if not os.path.exists(file) and re.fullmatch(r"[\w.-]+/[\w.-]+", file):
            cure = f"huggingface-cli download {file} --repo-type dataset --local-dir DIR"
            raise UserError(f"--data_file {file}: no such file; a data set of the Hugging Face hub is downloaded first: {cure}")
        split = re.fullmatch(r"train(?:\[(\d*):(\d*)\])?", line.value("sft_split", "train"))
        if not split:
            raise UserError(
                f"--sft_split {line.value('sft_split')}: wanted train or train[FIRST:LAST]; name another split's file itself"
            )
        if split[1] or split[2]:
            line.set("data_rows", f"{split[1] or ''}:{split[2] or ''}")
        line.set("data_type", "auto")
        line.default("fields", f"question={names[0]},answer={names[1]}")
        line.drop("loss_mask")  # it has no part in it: answers alone are trained
        notes.append("--data_type sft: answers alone are trained, laid out by the model's template (--template), not by Alpaca's")
    line.drop("sft_field", "sft_split")
    masks(line, more, notes)
    if "merge" in line:
        if line.pop("merge") not in ("0", "1"):
            raise UserError("--merge takes 0 or 1")
        notes.append("--merge: rwkv-N.pth is the adapter, which merge.py puts into the model; there the merged model is written")


def masks(line: Line, more: dict[str, Any], notes: list[str]) -> None:
    """--loss_mask qa, between "Assistant:" and "User:", and se, between the marks of --mask_id."""
    mask, text = line.value("loss_mask", ""), line.pop("mask_id")
    marks = {"begin": "Assistant:", "end": "User:"}
    if mask == "se":
        marks = parse("mask_id", text or "{}", {"mask0": ("end", str), "mask1": ("begin", str), "mask01": ("begin", str)})
        if set(marks) != {"begin", "end"} or not all(marks.values()):
            cure = 'needs --mask_id \'{"mask0": TEXT, "mask1": TEXT}\'; trained is what follows mask1, up to mask0'
            raise UserError(f"--loss_mask se: {cure}")
    elif mask == "qa" and line.words("data_type") != ["binidx"]:
        line.set("loss_mask", "answer")
        notes.append("--loss_mask qa: answers alone are trained")
        return
    elif mask != "qa":
        return
    line.drop("loss_mask")
    more |= {"loss_mask": "marked", "loss_marks": (marks["begin"], marks["end"])}
    notes.append(
        f"--loss_mask {mask}: trained is what follows {marks['begin']}, up to {marks['end']}; the marks are not (there, they are)"
    )


def defaults(line: Line, era: str, in_full: tuple[str, ...], more: dict[str, Any], notes: list[str]) -> None:
    """What the line leaves out, as RWKV-PEFT has it; and what flags that it gives mean there."""
    full = line.words("peft") == ["none"]
    if not full and era != "today" and line.default("train_parts", "time", "ln"):
        notes.append("no --train_parts: time and ln train in full beside the adapter (--train_parts [] trains the adapter alone)")
    elif not full and era == "today" and "train_parts" in line and not in_full:
        line.drop("train_parts")
        notes.append("--train_parts: not used since October 2025; the adapter alone trains")
    usual = {**DEFAULTS, "dataload": "get" if era == "first" and line.words("data_type") == ["binidx"] else "pad"}
    missing = [f"--{name} {value}" for name, value in usual.items() if line.default(name, value)]
    if missing:
        notes.append(f"not given, so as there: {' '.join(missing)}")
    schedule(line, era, notes)
    line.default("epoch_steps", "1000")
    more["repeat_data"] = True
    steps = counted(whole(line.value("epoch_steps")), "step")
    documents = " (there, since October 2025: so many documents)" if era == "today" else ""
    notes.append(f"an epoch is {steps}, whatever the data{documents}: data that is shorter is read again")
    if line.default("epoch_count", "1"):
        notes.append("no --epoch_count: 1 epoch (there 500)")
    if "precision" not in line:
        notes.append("no --precision: auto (there fp16)")


def schedule(line: Line, era: str, notes: list[str]) -> None:
    """The learning rate's curve: constant where both ends are the same, whatever --lr_schedule says."""
    first, last = line.value("lr_init"), line.value("lr_final")
    given = "lr_schedule" in line
    name = line.value("lr_schedule", "exp" if era == "first" else "cos")
    if number(first) == number(last):
        line.set("lr_schedule", "constant")
    elif name == "wsd":
        warmup = line.value("warmup_steps", "0")
        line.set("warmup_steps", warmup if whole(warmup) else "100")
        line.set("lr_final", "0")
        line.set("lr_schedule", "warmup_cos")
        notes.append(f"--lr_schedule wsd: {line.value('warmup_steps')} steps of linear warm-up from 0, then a cosine to 0")
    else:
        line.set("lr_schedule", name)
        if not given:
            curve = "exponentially" if name == "exp" else "along a cosine"
            notes.append(f"no --lr_schedule: the rate goes from {first} to {last} {curve}")


def whole(text: str) -> int:
    """A count of steps or samples as given; 0 for what is none, which the parser refuses."""
    return int(text) if text.isascii() and text.isdigit() and len(text) < 19 else 0


def number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
