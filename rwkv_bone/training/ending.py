"""What is said at a run's end, all of it from the run's own files: how the loss went, what it took, what to do next."""

import math
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..config import TrainConfig
from ..files.models import reads_as_folder
from ..terminal import LABEL, clock, counted, fitted, in_bytes, next_command
from . import samples, verdict
from .losses import first_and_last, mean_loss
from .outputs import BEST, RunFolder, numbered
from .verdict import Held


class Course(NamedTuple):
    """How a run went, by its logs; of a resumed run all parts of it."""

    steps: list[dict[str, Any]]  # the lines of loss_data.jsonl
    first: float  # loss, as losses.py defines it
    last: float
    held_out: list[Held]
    samples: list[samples.Sample]

    @classmethod
    def of(cls, folder: RunFolder, config: TrainConfig) -> "Course":
        lines = folder.lines("loss_data.jsonl")
        first, last = first_and_last([line["loss"] for line in lines], [line["trained"] for line in lines])
        measures = folder.lines("val_data.jsonl")
        held_out = [Held(m["step"], m.get("epoch", config.epoch_begin), m["loss"]) for m in measures]
        return cls(lines, first, last, held_out, samples.read_samples(folder))

    @property
    def seconds(self) -> float:
        return sum(line["t_cost"] for line in self.steps)

    @property
    def tokens(self) -> int:
        return sum(line["tokens"] for line in self.steps)

    @property
    def trained(self) -> int:
        return sum(line["trained"] for line in self.steps)


def peak_bytes(device: str) -> int:
    """The most memory that this process has held so far: on the GPU what torch has given out, else all that is resident.

    0 where the system does not tell.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def describe(
    folder: RunFolder, config: TrainConfig, course: Course, off: str, commands: list[str], device: str, files: list[str]
) -> str:
    """The lines. off: the verdict; commands: what to type next; device: its kind; files: what else lies in the folder."""
    peak = peak_bytes(device)
    memory = f"; peak memory {in_bytes(peak)}" + " (all of the process)" * (device == "cpu") if peak else ""
    (name, done), *others = facts(course)
    lines = [f"{name:{LABEL}}{text}" for name, text in [(name, done + memory), *others]]
    lines += [f"verdict    {off}"] if off else []
    for prompt, before, after in samples.first_and_last(course.samples):
        lines += [
            f"sample     {samples.one_line(prompt)}",
            f"  before   {samples.one_line(before)}",
            f"  after    {samples.one_line(after)}",
        ]
    results = numbered(folder, config)
    lines += [f"saved      {folder / results[-1]}" + more_of(results)] if results else []
    if (folder / BEST).exists():
        lines.append(f"           {folder / BEST}, which has the lowest held-out loss")
    lines.append(f"           {', '.join(files)} and the logs beside it")
    lines += [f"{'next' if n == 0 else '':10} {command}" for n, command in enumerate(commands)]
    return "\n".join(map(fitted, lines))


def facts(course: Course) -> list[tuple[str, str]]:
    """What the run did, as (what, text)."""
    last, epochs = course.steps[-1], course.steps[-1]["epoch"] - course.steps[0]["epoch"] + 1
    return [
        ("done", f"after step {last['step']:,}, {counted(epochs, 'epoch')}, in {clock(course.seconds)}"),
        ("tokens", f"{course.tokens:,} read, {course.trained:,} of them trained"),
        ("loss", losses(course)),
    ]


def more_of(results: list[str]) -> str:
    return f" and {counted(len(results) - 1, 'earlier one')}" if len(results) > 1 else ""


def losses(course: Course) -> str:
    """The first and the last loss, of what was trained and of what was held out."""
    text = f"{course.first:.4f} at first, {course.last:.4f} at the end" if math.isfinite(course.last) else "no trained token"
    if course.held_out:
        first, last = course.held_out[0], course.held_out[-1]
        at = "before the first step" if first.step == 0 else f"after step {first.step}"
        text += f"; held out {first.loss:.4f} {at}" + (f", {last.loss:.4f} at the end" if len(course.held_out) > 1 else "")
        best = min(course.held_out, key=lambda h: h.loss)
        text += f", lowest {best.loss:.4f} after step {best.step}" if best.step not in (first.step, last.step) else ""
    return text


def verdict_of(course: Course, config: TrainConfig, recommended: float) -> str:
    """What is off with the run, "" where nothing is."""
    enough = not config.load_model or verdict.worth(len(course.steps), config, recommended) >= verdict.ENOUGH
    loss, trained = ([line[name] for line in course.steps] for name in ("loss", "trained"))
    if len(loss) == 1 and not course.held_out:
        return "one step does not show whether the model learns: train for more steps (--epoch_count)"
    n = max(1, len(loss) // 4)  # so many that the luck of a few documents says little
    quarters = mean_loss(loss[:n], trained[:n]), mean_loss(loss[-n:], trained[-n:])
    return verdict.verdict(quarters, course.held_out, enough)


def next_commands(folder: RunFolder, config: TrainConfig, asks: bool, course: Course) -> list[str]:
    """What to type next: merge, and ask the merged model; or to ask a model that was trained as a whole."""
    results = numbered(folder, config)
    take = folder / BEST if (folder / BEST).exists() else folder / results[-1] if results else None
    if take is None:
        return []
    commands = []
    of_folder = reads_as_folder(config.load_model)
    if config.peft != "none" or config.train_type == "state" or of_folder:
        merged = free_name("tuned", "" if of_folder else ".pth")
        commands.append(next_command(
            "merge", base_model=config.load_model, peft_checkpoint=take, output=merged, quant=config.quant))  # fmt: skip
        take = Path(merged)
    prompts = list(dict.fromkeys(sample.prompt for sample in course.samples))
    how: dict[str, object] = {"instruct": asks, "prompt": prompts[0]} if prompts else {"chat": True}
    if not prompts and not asks:
        how = {"prompt": "The"}
    commands.append(next_command("generate", model=take, **how))
    return commands


def free_name(stem: str, ending: str = ".pth") -> str:
    """A name of which there is no file here: tuned.pth, tuned-2.pth, ..."""
    number = 1
    while os.path.lexists(name := f"{stem}{f'-{number}' * (number > 1)}{ending}"):
        number += 1
    return name
