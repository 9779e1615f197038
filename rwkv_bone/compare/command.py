"""Methods against each other: same base, data, batches, steps and number of trained parameters; learning rate tuned for each.

    python -m rwkv_bone.compare CONFIG.json [--out DIR]

The config holds flags of train.py by their names (load_model, data_file, ctx_len, micro_bsz, threads, ...) and the fields of
`Comparison` below. For each method every rate is tried with the first seed, the grid is continued while its best rate is the
outermost, and refined around it; then the other seeds run at the best rate. Half of the held-out documents (every second)
chooses the rate, the other half is what is reported. A seed sets both the order of the data, the same for all methods, and an
adapter's start.

Each run is a process of its own, forked from one that has imported everything: nothing carries over from run to run, and its
memory is its own. When it ends it becomes one line of DIR/runs.jsonl. Runs found there are not repeated, so that starting again
goes on, and a larger grid, more seeds or another method cost only what is new. From these lines are made

    table.md, table.csv   a row a method          runs.csv    a row a run
    curves.csv            a row a run and step     curves.png  curves, sweep and results in one picture
"""

import argparse
import datetime
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..config import TrainConfig
from ..data.documents import Documents, data_of, open_documents
from ..data.tokenizer import open_tokenizer
from ..errors import Parser, UserError
from ..errors import run as run_main
from ..evaluate.loss import identity
from ..files.models import load_model
from ..peft import METHODS, TRAIN_PARTS
from ..peft.adapter import matches
from ..training.loader import TrainingData
from . import one_run as comparison_run
from . import report as comparison_report

RATES = (1e-3, 3e-3, 1e-2)
OURS = ("proj_dir", "peft", "peft_options", "lr_init", "lr_final", "random_seed", "epoch_count", "epoch_steps", "resume",
        "overwrite", "dry_run", "peft_checkpoint", "epoch_begin", "epoch_save", "fields", "template", "format")  # fmt: skip
NO_MATTER = ("proj_dir", "threads", "overwrite", "save_every_minutes", "load_model", "data_file")  # cannot change a result


class Entry(NamedTuple):
    """One row of the table: a method with its options, or `none`, full training, and the rates to try."""

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
    fields: dict[str, str] = field(default_factory=dict)  # {"question": "problem"}: names of the fields in jsonl files
    methods: dict[str, dict[str, Any]] = field(default_factory=lambda: {name: {} for name in (*METHODS, "none")})
    # label -> options of the method, its own "lrs", and "method" where the label is not a method's name
    budget: str | int = "bone"  # trained parameters: a number, or the label whose r says it; r of the others is chosen by it
    lrs: tuple[float, ...] = RATES
    lr_final_ratio: float = 1.0  # the last step's rate, as a share of the first one's, by --lr_schedule
    extend: int = 3  # how many rates the grid may grow by, while the best is the outermost
    refine: int = 1  # how many rates may be tried between them, where a parabola through the best and its neighbours is lowest
    seeds: tuple[int, ...] = (0, 1, 2)
    workers: int = 1  # runs at a time
    flags: dict[str, Any] = field(default_factory=dict)  # those of train.py, which stand beside these in the file

    @classmethod
    def read(cls, path: str | Path) -> "Comparison":
        try:
            given = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
        if not isinstance(given, dict):
            raise UserError(f"{path}: wanted an object with steps, held_out, load_model, data_file; see benchmarks/*.json")
        own = {f.name for f in fields(cls)} - {"flags"}
        flags = {f.name for f in fields(TrainConfig)} - set(OURS)
        if unknown := [name for name in given if name not in own | flags]:
            why = "set by the comparison itself" if unknown[0] in OURS else "neither a flag of train.py nor one of "
            raise UserError(f"{path}: {unknown[0]} is {why}" + ("" if unknown[0] in OURS else ", ".join(sorted(own))))
        for name in ("steps", "held_out", "load_model", "data_file"):
            if name not in given:
                raise UserError(f"{path}: {name} is missing")
        tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
        given = {**given, **tuples}
        found = cls(**{k: v for k, v in given.items() if k in own}, flags={k: v for k, v in given.items() if k in flags})
        lowest = {"steps": 1, "held_out_documents": 2, "held_out_every": 1, "extend": 0, "refine": 0, "workers": 1}
        for name, low in lowest.items():
            if not getattr(found, name) >= low:
                raise UserError(f"{path}: {name} must be at least {low}, not {getattr(found, name)}")
        if not found.seeds or len(set(found.seeds)) < len(found.seeds):
            raise UserError(f"{path}: seeds must be a list of different numbers, not {list(found.seeds)}")
        return found

    def config(self, run: Run | None = None, epochs: int = 1, proj_dir: str | Path = "unused") -> TrainConfig:
        """train.py's configuration of one run; without a run, of what all share."""
        own: dict[str, Any] = {"epoch_count": epochs, "epoch_steps": self.steps // epochs}
        own |= {"proj_dir": str(proj_dir), "overwrite": True}
        if run is None or run.entry.method == "base":
            return TrainConfig(**self.flags, **own, peft="none", random_seed=run.seed if run else 0)
        return TrainConfig(**self.flags, **own, peft=run.entry.method, peft_options=dict(run.entry.options), lr_init=run.lr,
                           lr_final=run.lr * self.lr_final_ratio, random_seed=run.seed)  # fmt: skip


# -------------------------------------------------- equal numbers of trained parameters


def projection_shapes(model: nn.Module, parts: Iterable[str]) -> Counter[tuple[int, int]]:
    """Shapes (out, in) of the projections that get an adapter, and how many have each."""
    linears = ((name, m) for name, m in model.named_modules() if type(m) is nn.Linear)
    return Counter((m.out_features, m.in_features) for name, m in linears if matches(name, parts))


def trained_parameters(shapes: Mapping[tuple[int, int], int], method: str, options: Mapping[str, Any]) -> int:
    layer = METHODS[method]
    config = layer.config_from(options, method)
    total = 0
    for shape, count in shapes.items():
        made = layer(torch.empty(shape, device="meta"), config)
        total += count * sum(p.numel() for p in made.parameters() if p.requires_grad)
    return total


def match_r(shapes: Mapping[tuple[int, int], int], method: str, options: Mapping[str, Any], budget: int) -> int:
    """The r at which the method trains most nearly `budget` parameters; the smaller of two that are equally near."""
    best, best_distance = 0, math.inf
    for r in range(1, max(max(shape) for shape in shapes) + 1):
        try:
            count = trained_parameters(shapes, method, {**options, "r": r})
        except UserError:  # more than the method can have on these shapes
            if best:
                break
            raise
        if abs(count - budget) < best_distance:
            best, best_distance = r, abs(count - budget)
        if count > 2 * budget:
            break
    return best


def make_entries(comparison: Comparison, model: nn.Module) -> list[Entry]:
    """The rows of the table, each method with its r."""
    shared = comparison.config()
    shapes, whole = projection_shapes(model, shared.parts), sum(p.numel() for p in model.parameters())
    beside = sum(p.numel() for name, p in model.named_parameters() if any(TRAIN_PARTS[part](name) for part in shared.train_parts))
    given: dict[str, tuple[str, dict[str, Any], tuple[float, ...]]] = {}
    for label, said in comparison.methods.items():
        options = dict(said)
        method, lrs = options.pop("method", label), tuple(sorted(options.pop("lrs", comparison.lrs)))
        if method not in ("none", *METHODS) or label == "base":
            raise UserError(f"methods: {label} is no method; there are none, {', '.join(METHODS)}")
        if method == "none" and options:
            raise UserError(f"methods: {label} trains the whole model and has no option {next(iter(options))}")
        if not lrs or not all(lr > 0 for lr in lrs):
            raise UserError(f"methods: lrs of {label} must be positive numbers")
        given[label] = (method, options, lrs)
    budget = comparison.budget
    if isinstance(budget, str) and any(m != "none" and "r" not in o for m, o, _ in given.values()):
        if budget not in given or given[budget][0] == "none":
            raise UserError(f"budget: {budget} is no adapter among methods; give one that is, or a number of parameters")
        method, options, _ = given[budget]
        budget = trained_parameters(shapes, method, options)
    entries = []
    for label, (method, options, lrs) in given.items():
        if method != "none" and "r" not in options:
            assert isinstance(budget, int)
            options = {"r": match_r(shapes, method, options, budget), **options}
        trained = whole if method == "none" else trained_parameters(shapes, method, options) + beside
        entries.append(Entry(label, method, tuple(options.items()), lrs, trained))
    return entries


# -------------------------------------------------- what is to be run next


def next_rate(lr: float, up: bool) -> float:
    """The nearest of 1, 3, 10, 30, ... times a power of ten that is clearly above or below `lr`."""
    near = [float(f"{digit}e{power}") for power in range(-12, 7) for digit in (1, 3)]
    return min(x for x in near if x > 1.5 * lr) if up else max(x for x in near if x < lr / 1.5)


def vertex(points: Iterable[tuple[float, float]]) -> float:
    """Where a parabola of the logarithm through three (rate, loss), the middle one lowest, is lowest; to two digits."""
    (x0, y0), (x1, y1), (x2, y2) = ((math.log(lr), loss) for lr, loss in points)
    left, right = (y0 - y1) / (x0 - x1), (y2 - y1) / (x2 - x1)
    x = (x0 + x1) / 2 - left * (x2 - x0) / (2 * (right - left))  # where the slope, which is `left` at the first middle, is 0
    return float(f"{math.exp(x):.1e}")


def sweep(entry: Entry, seed: int, extend: int, refine: int, chosen_by: Mapping[Run, float]) -> tuple[list[Run], float]:
    """The runs of a sweep that are known to be wanted and are not done yet, and the best rate so far.

    chosen_by  run -> loss on the choosing half of the held-out documents, of the runs that are done
    """
    lrs = list(entry.lrs)
    while True:
        runs = {lr: Run(entry, lr, seed) for lr in lrs}
        losses = {lr: chosen_by[run] for lr, run in runs.items() if run in chosen_by}
        missing = [run for lr, run in runs.items() if lr not in losses]
        best = min(losses, key=losses.__getitem__, default=lrs[0])
        if missing:
            return missing, best
        place = lrs.index(best)
        if extend and place == len(lrs) - 1 and math.isfinite(losses[best]):
            lrs.append(next_rate(best, up=True))
            extend -= 1
        elif extend and place == 0:
            lrs.insert(0, next_rate(best, up=False))
            extend -= 1
        elif refine and 0 < place < len(lrs) - 1 and math.isfinite(losses[lrs[place + 1]]):
            found = vertex((lr, losses[lr]) for lr in lrs[place - 1 : place + 2])
            refine -= 1
            if all(abs(math.log(found / lr)) > 0.1 for lr in lrs):  # else it was as good as tried
                lrs = sorted([*lrs, found])
        else:
            return [], best


def to_do(
    entries: Iterable[Entry], seeds: tuple[int, ...], extend: int, refine: int, chosen_by: Mapping[Run, float]
) -> list[Run]:
    """All runs that are known to be wanted and are not done: first the sweeps, then one seed after the other."""
    sweeps, repeats = [], []
    for entry in entries:
        if entry.method == "base":
            repeats += [(number, Run(entry, 0.0, seed)) for number, seed in enumerate(seeds)]
            continue
        missing, best = sweep(entry, seeds[0], extend, refine, chosen_by)
        sweeps += missing
        if not missing:
            repeats += [(number, Run(entry, best, seed)) for number, seed in enumerate(seeds)]
    ordered = [run for _, run in sorted(repeats, key=lambda item: item[0])]
    return [run for run in sweeps + ordered if run not in chosen_by]


# -------------------------------------------------- all runs


class Study:
    """A comparison with its data and the runs that are done."""

    def __init__(self, comparison: Comparison, out: Path):
        shared = comparison.config()
        model = load_model(shared.load_model)
        self.comparison, self.out = comparison, out
        self.base = Entry("base", "base", (), (), 0)
        self.entries = make_entries(comparison, model)
        self.reference = comparison.budget if comparison.budget in comparison.methods else self.entries[0].label
        self.documents = self.open(shared, shared.data_file, model.config.vocab_size)
        self.held_out = self.open(replace(shared, data_type="auto"), comparison.held_out, model.config.vocab_size)
        self.held_out_ids = range(0, len(self.held_out), comparison.held_out_every)[: comparison.held_out_documents]
        self.epochs = self.count_epochs(shared)
        self.of_all = {"base": model.fingerprint, "data": identity(self.documents), "held_out": identity(self.held_out),
                       "held_out_documents": comparison.held_out_documents}  # fmt: skip
        if comparison.held_out_every != 1:
            self.of_all["held_out_every"] = comparison.held_out_every
        out.mkdir(parents=True, exist_ok=True)
        self.file = out / "runs.jsonl"
        self.done = self.read()

    def describe(self) -> str:
        """What will be compared, before the first run."""
        c, shared = self.comparison, self.comparison.config()
        rows = shared.micro_bsz * shared.accumulate_grad_batches
        lines = [
            f"base      {shared.load_model}",
            f"data      {shared.data_file}: {len(self.documents):,} documents, {self.documents.total_tokens:,} tokens",
            f"held out  {c.held_out}: {len(self.held_out_ids)} documents, "
            f"{int(self.held_out.sizes[self.held_out_ids].sum()):,} tokens, every second one to choose the rate",
            f"a run     {c.steps} steps of {rows} rows of at most {shared.ctx_len} tokens",
        ]
        for entry in self.entries:
            options = ", ".join(f"{name}={value}" for name, value in entry.options) or "the whole model"
            rates = " ".join(f"{lr:g}" for lr in entry.lrs)
            lines.append(f"{entry.label:12} {options}, {entry.trained:,} parameters, lr {rates}")
        done, left = len(self.results()), self.expected()
        return "\n".join([*lines, f"{done} runs are done, {left} or more are to be done, in {self.out}"])

    def open(self, config: TrainConfig, path: str, vocab_size: int) -> Documents:
        text = data_of(path, config.data_type)[1] in ("jsonl", "utf-8")
        tokenizer = open_tokenizer(config.tokenizer, vocab_size, config.vocab_file or None, config.encoding) if text else None
        mask = "all" if config.loss_mask == "none" else config.loss_mask
        return open_documents(path, config.data_type, tokenizer, vocab_size, fields=self.comparison.fields, loss_mask=mask)

    def count_epochs(self, shared: TrainConfig) -> int:
        """The fewest epochs of equal length that make up the steps."""
        steps, there = self.comparison.steps, TrainingData(self.documents, replace(shared, epoch_steps=0)).steps_per_epoch(1)
        return next(n for n in range(1, steps + 1) if steps % n == 0 and steps // n <= there)

    def config(self, run: Run) -> TrainConfig:
        return self.comparison.config(run, self.epochs, self.out / "running" / self.key(run))

    def key(self, run: Run) -> str:
        """What tells one run from every other: all that can change its result."""
        config, usual = self.comparison.config(run, self.epochs), TrainConfig(data_file="-")
        said = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in NO_MATTER}
        said = {name: value for name, value in said.items() if value != getattr(usual, name)}
        text = json.dumps([self.of_all, run.entry.method, said], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def read(self) -> dict[str, dict[str, Any]]:
        """key -> record of the runs that are done. A last line that was cut off is dropped."""
        if not self.file.exists():
            return {}
        text = self.file.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(self.file, whole)
        try:
            return {record["key"]: record for record in map(json.loads, text[:whole].splitlines())}
        except (ValueError, KeyError) as error:
            raise UserError(f"{self.file} is damaged ({error}); remove the bad line") from None

    def add(self, run: Run, result: dict[str, Any]) -> None:
        record = {"key": self.key(run), "label": run.entry.label, "method": run.entry.method, "options": dict(run.entry.options),
                  "lr": run.lr, "seed": run.seed, "date": datetime.datetime.now(datetime.timezone.utc).isoformat()[:19],
                  **result}  # fmt: skip
        with self.file.open("a") as file:
            file.write(json.dumps(record) + "\n")
        self.done[record["key"]] = record

    def results(self) -> dict[Run, dict[str, Any]]:
        """The runs that belong to this comparison, of whatever rates."""
        found = {}
        for entry in (self.base, *self.entries):
            like = [r for r in self.done.values() if r["method"] == entry.method and r["options"] == dict(entry.options)]
            for run in {Run(entry, r["lr"], r["seed"]) for r in like if r["seed"] in self.comparison.seeds}:
                if record := self.done.get(self.key(run)):
                    found[run] = record
        return found

    def to_do(self) -> list[Run]:
        chosen_by = {run: record["choosing_loss"] for run, record in self.results().items()}
        c = self.comparison
        return to_do((self.base, *self.entries), c.seeds, c.extend, c.refine, chosen_by)

    def run(self) -> None:
        """Do what is not done yet, `workers` runs at a time."""
        forked = "forkserver" in multiprocessing.get_all_start_methods()
        context = multiprocessing.get_context("forkserver" if forked else "spawn")
        if forked:
            context.set_forkserver_preload(["rwkv_bone.compare.one_run", "rwkv_bone.training.validation", "rwkv_bone.plot"])
        running: dict[Any, tuple[Run, Any]] = {}
        began, first = time.monotonic(), len(self.done)
        try:
            while True:
                busy = {run for run, _ in running.values()}
                waiting = [run for run in self.to_do() if run not in busy]
                for run in waiting[: self.comparison.workers - len(running)]:
                    receiver, process = self.start(context, run)
                    running[receiver] = (run, process)
                if not running:
                    break
                for receiver in multiprocessing.connection.wait(list(running)):
                    run, process = running.pop(receiver)
                    result = self.finish(run, process, receiver)
                    self.add(run, result)
                    shutil.rmtree(self.config(run).proj_dir, ignore_errors=True)
                    self.say(run, result, (time.monotonic() - began) / (len(self.done) - first))
        finally:
            for _, process in running.values():
                process.kill()

    def start(self, context, run: Run):
        config = self.config(run)
        shutil.rmtree(config.proj_dir, ignore_errors=True)
        Path(config.proj_dir).mkdir(parents=True)
        receiver, sender = context.Pipe(duplex=False)
        data = (run.entry.method == "base", self.documents, self.held_out, self.held_out_ids)
        process = context.Process(target=comparison_run.child, args=(sender, config, *data), daemon=True)
        process.start()
        sender.close()  # so that the death of the process reads as the end of the pipe
        return receiver, process

    def finish(self, run: Run, process, receiver) -> dict[str, Any]:
        name = f"{run.entry.label}, lr {run.lr:g}, seed {run.seed}"
        output = Path(self.config(run).proj_dir) / "output.txt"
        try:
            state, result = receiver.recv()
        except EOFError:
            process.join()
            raise UserError(f"{name}: its process ended with code {process.exitcode} (memory?); see {output}") from None
        process.join()
        if state == "refused":
            raise UserError(f"{name}: {result}")
        if state == "stopped":
            raise KeyboardInterrupt
        if state == "crashed":
            raise RuntimeError(f"{name}; see {output}\n{result}")
        return result

    def say(self, run: Run, result: dict[str, Any], each: float) -> None:
        """A line after each run: what came out, and how long the rest will take (grids may grow, then longer)."""
        left = self.expected()
        loss = "diverged" if result["diverged"] else f"held-out loss {result['held_out_loss']:.4f}"
        rate = f"lr {run.lr:<7g} " if run.lr else " " * 11
        print(f"{len(self.results()):3}/{len(self.results()) + left}  {run.entry.label:12} {rate}seed {run.seed}  {loss}, "
              f"{result['seconds']:.0f} s; about {left * each / 60:.0f} min to go", flush=True)  # fmt: skip

    def expected(self) -> int:
        """How many runs are left if no grid grows."""
        waiting = self.to_do()
        sweeping = {run.entry.label for run in waiting if run.entry.lrs and run.seed == self.comparison.seeds[0]}
        return len(waiting) + len(sweeping) * (len(self.comparison.seeds) - 1)

    def at_best(self, entry: Entry) -> list[dict[str, Any]]:
        """The records of an entry at its best rate so far, in the order of seeds; fewer where seeds are not done."""
        results, seeds, best = self.results(), self.comparison.seeds, 0.0
        if entry.lrs:
            chosen_by = {run: record["choosing_loss"] for run, record in results.items()}
            _, best = sweep(entry, seeds[0], self.comparison.extend, self.comparison.refine, chosen_by)
        return [results[run] for run in (Run(entry, best, seed) for seed in seeds) if run in results]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="rwkv_bone.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG.json")
    parser.add_argument("--out", default="", metavar="DIR", help="default: CONFIG beside the config, without .json")
    parser.add_argument("--report", action="store_true", help="run nothing: make table and picture of the runs that are done")
    args = parser.parse_args(argv)
    study = Study(Comparison.read(args.config), Path(args.out or Path(args.config).with_suffix("")))
    print(study.describe(), flush=True)
    if not args.report:
        study.run()
    comparison_report.write(study)


if __name__ == "__main__":
    run_main(main)
