"""What is compared: the configuration file, each field checked by name, type and range before anything is read or run."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..config import TrainConfig
from ..errors import UserError
from ..peft import METHODS

RATES = (1e-3, 3e-3, 1e-2)
NO_ADAPTER = ("base", "none", "state")  # the untrained model, full training, state tuning
OURS = ("proj_dir", "peft", "peft_options", "lr_init", "lr_final", "random_seed", "epoch_count", "epoch_steps", "resume",
        "overwrite", "dry_run", "peft_checkpoint", "epoch_begin", "epoch_save", "fields")


class Entry(NamedTuple):
    """One row of the table: a method with its options, `none`, full training, or `state`, state tuning; and the rates to try."""

    label: str
    method: str
    options: tuple[tuple[str, Any], ...]
    lrs: tuple[float, ...]
    trained: int  # parameters


class Run(NamedTuple):
    entry: Entry
    lr: float
    seed: int


@dataclass(frozen=True)
class Comparison:
    """What the config says beside the flags of train.py."""

    steps: int  # optimiser steps of each run
    held_out: str  # data as data_file is, of which every `held_out_every`-th document is held out, `held_out_documents` in all
    held_out_documents: int = 64
    held_out_every: int = 1
    general: str = ""  # other text, as data_file is: what a model forgets is how much its loss on it rises
    general_documents: int = 24  # of which so many are read, each up to its first GENERAL_TOKENS tokens
    fields: dict[str, str] = field(default_factory=dict)  # {"question": "problem"}: names of the fields in jsonl files
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in (*METHODS, "none")})
    # label -> options of the method, its own "lrs", and "method" where the label is not a method's name
    budget: str | int = "bone"  # trained parameters: a number, or the label whose r says it; r of the others is chosen by it
    lrs: tuple[float, ...] = RATES
    one_rate: float = 0  # a rate that every adapter runs at with every seed, for a table of its own; 0: none
    lr_final_ratio: float = 1.0  # the last step's rate, as a share of the first one's, by --lr_schedule
    extend: int = 3  # how many rates the grid may grow by, while the best is the outermost
    refine: int = 1  # how many rates may be tried between them, where a parabola through the best and its neighbours is lowest
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 1  # runs at a time
    keep: bool = False  # whether what each run trained is kept, in DIR/trained
    flags: dict[str, Any] = field(default_factory=dict)  # those of train.py, which stand beside these in the file

    @classmethod
    def read(cls, path: str | Path) -> "Comparison":
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(given, dict):
            raise UserError(f"{path}: wanted an object with steps, held_out, load_model, data_file; see benchmarks/*.json")
        flags = {f.name: f for f in fields(TrainConfig) if f.name not in OURS}
        for name, value in given.items():
            if name in OURS and name not in CHECKS:
                raise UserError(f"{path}: {name} is set by the comparison itself")
            if name not in flags and name not in CHECKS:
                raise UserError(f"{path}: {name} is neither a flag of train.py nor one of {', '.join(sorted(CHECKS))}")
            wanted = check_flag(flags[name], value) if name in flags else "" if CHECKS[name][0](value) else CHECKS[name][1]
            if wanted:
                raise UserError(f"{path}: {name} must be {wanted}, not {shortened(value)}")
        for name in ("steps", "held_out", "load_model", "data_file"):
            if name not in given:
                raise UserError(f"{path}: {name} is missing")
        given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
        own = {name: value for name, value in given.items() if name not in flags}
        found = cls(**own, flags={name: value for name, value in given.items() if name in flags})
        found.config()  # refuses flags that contradict each other
        return found

    def config(self, run: Run | None = None, epochs: int = 1, proj_dir: str | Path = "unused") -> TrainConfig:
        """train.py's configuration of one run; without a run, of what all share."""
        given = {**self.flags, "proj_dir": str(proj_dir), "overwrite": True}
        given |= {"epoch_count": epochs, "epoch_steps": self.steps // epochs}
        method = "base" if run is None else run.entry.method
        if method in NO_ADAPTER:
            given.pop("train_parts", None)  # nothing is trained, or all
        if run is None or method == "base":
            return TrainConfig(**given, peft="none", random_seed=run.seed if run else 0)
        if method == "state":
            given["train_type"], method = "state", "none"
        return TrainConfig(**given, peft=method, peft_options=dict(run.entry.options), lr_init=run.lr,
                           lr_final=run.lr * self.lr_final_ratio, random_seed=run.seed)  # fmt: skip


# -------------------------------------------------- what each field takes


def whole(low: int, high: int = 2**31 - 1) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


def positive(value: Any) -> bool:
    """A rate within what a float32 can hold."""
    return type(value) in (int, float) and 1e-30 <= value <= 1e30


def text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= 4000


def listed(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list of different values, at least one."""
    return lambda value: isinstance(value, list) and bool(value) and all(map(check, value)) and len({*value}) == len(value)


def texts(value: Any) -> bool:
    return isinstance(value, dict) and all(text(name) and text(said) for name, said in value.items())


def options(value: Any) -> bool:
    """label -> options of a method, which are text or numbers, and lrs."""
    return isinstance(value, dict) and bool(value) and all(
        text(label) and label and isinstance(said, dict)
        and all(listed(positive)(v) if name == "lrs" else isinstance(v, str | int | float) for name, v in said.items())
        for label, said in value.items()
    )  # fmt: skip


CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (whole(1, 10**7), "a whole number, at least 1"),
    "held_out": (text, "the name of data"),
    "held_out_documents": (whole(2), "a whole number, at least 2"),
    "held_out_every": (whole(1), "a whole number, at least 1"),
    "fields": (texts, 'names, such as {"question": "problem"}'),
    "general": (text, "the name of data"),
    "general_documents": (whole(1), "a whole number, at least 1"),
    "methods": (options, 'methods with their options, such as {"bone": {"r": 8, "lrs": [0.001]}}'),
    "budget": (lambda value: whole(1, 2**53)(value) or text(value), "one of methods, or a number of parameters"),
    "lrs": (listed(positive), "a list of different positive rates"),
    "one_rate": (lambda value: value == 0 or positive(value), "a rate, or 0"),
    "keep": (lambda value: isinstance(value, bool), "true or false"),
    "lr_final_ratio": (lambda value: value == 0 or positive(value), "a number, at least 0"),
    "extend": (whole(0), "a whole number, at least 0"),
    "refine": (whole(0), "a whole number, at least 0"),
    "seeds": (listed(whole(0)), "a list of different whole numbers, at least 0"),
    "workers": (whole(1), "a whole number, at least 1"),
}


def check_flag(flag, value: Any) -> str:
    """What a flag of train.py takes, where `value` is nothing of that; else "" (TrainConfig checks the ranges)."""
    kind, choices = type(flag.default), flag.metadata["choices"]
    if choices and value not in choices:
        return f"one of {', '.join(map(str, choices))}"
    if kind is bool:
        return "" if isinstance(value, bool) or (type(value) is int and value in (0, 1)) else "true or false"
    if kind is int:
        return "" if whole(-(2**53), 2**53)(value) else "a whole number"
    if kind is float:
        return "" if type(value) in (int, float) and abs(value) <= 1e30 else "a number"
    if kind is tuple:
        return "" if isinstance(value, list) and all(map(text, value)) else "a list of names"
    return "" if text(value) else "text"


def shortened(value: Any) -> str:
    try:
        said = json.dumps(value)
    except RecursionError:
        return "so deep a list"
    return said if len(said) <= 60 else said[:57] + "..."
