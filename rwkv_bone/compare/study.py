"""A comparison while it goes on: its data, the runs that are done (runs.jsonl), and the processes of those that are not."""

import datetime
import hashlib
import json
import math
import multiprocessing
import multiprocessing.connection
import os
import shutil
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config import TrainConfig
from ..data.documents import Documents, data_of
from ..errors import UserError
from ..evaluate.loss import identity
from ..files.models import load_model
from ..models import LanguageModel
from ..training.loader import TrainingData
from . import one_run
from .comparison import Comparison, Entry, Run
from .sweep import make_entries, sweep, to_do

NO_MATTER = ("proj_dir", "threads", "overwrite", "save_every_minutes", "load_model", "data_file")  # cannot change a result
TRAINED = {"none": "the whole model", "state": "the initial states"}

RECORD = {
    str: ("key", "label", "method", "date", "device", "diverged"),
    dict: ("options",),
    list: ("losses",),
    float: ("lr", "seed", "choosing_loss", "held_out_loss", "trained", "step_seconds", "step_cpu_seconds", "peak_bytes",
            "seconds"),
}


def is_record(row: Any) -> bool:
    """Whether a line of runs.jsonl holds what `Study.add` writes. A diverged run's losses are infinite."""
    if not isinstance(row, dict):
        return False
    kinds = [isinstance(row.get(name), (int, float) if kind is float else kind) for kind in RECORD for name in RECORD[kind]]
    if not all(kinds) or type(row["seed"]) is not int:
        return False
    numbers = [row[name] for name in RECORD[float]]
    tokens = row.get("step_tokens", [])  # earlier versions said none
    if not isinstance(tokens, list) or len(tokens) not in (0, len(row["losses"])):
        return False
    general = row.get("general_loss")
    numbers += row["losses"] + tokens + ([] if general is None else [general])
    return all(type(n) in (int, float) and (n == math.inf or 0 <= n <= 1e30) for n in numbers)


class Study:
    """A comparison with its data and the runs that are done."""

    def __init__(self, comparison: Comparison, out: Path):
        shared = comparison.config()
        model = load_model(shared.load_model)
        self.comparison, self.out = comparison, out
        self.base = Entry("base", "base", (), (), 0)
        self.entries = make_entries(comparison, model)
        self.reference = comparison.budget if comparison.budget in comparison.methods else self.entries[0].label
        self.documents = self.open(shared, model)
        self.held_out = self.open_other(comparison.held_out, shared, model)
        self.general = self.open_other(comparison.general, shared, model) if comparison.general else None
        self.held_out_ids = range(0, len(self.held_out), comparison.held_out_every)[: comparison.held_out_documents]
        self.epochs = self.count_epochs(shared)
        for entry in self.entries:  # refuses flags that a method does not go with, before the first run
            comparison.config(Run(entry, entry.lrs[0], comparison.seeds[0]), self.epochs)
        self.of_all = {"base": model.fingerprint, "data": identity(self.documents), "held_out": identity(self.held_out),
                       "held_out_documents": comparison.held_out_documents}  # fmt: skip
        if comparison.held_out_every != 1:
            self.of_all["held_out_every"] = comparison.held_out_every
        if self.general is not None:
            self.of_all["general"] = identity(self.general), comparison.general_documents
        self.file = out / "runs.jsonl"
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.done = self.read()
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}; give another --out") from None

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
        if self.general is not None:
            lines.insert(3, f"general   {c.general}: the beginnings of {min(c.general_documents, len(self.general))} documents")
        for entry in self.entries:
            options = ", ".join(f"{name}={value}" for name, value in entry.options) or TRAINED[entry.method]
            rates = " ".join(f"{lr:g}" for lr in entry.lrs)
            lines.append(f"{entry.label:12} {options}, {entry.trained:,} parameters, lr {rates}")
        done, left = len(self.results()), self.expected()
        return "\n".join([*lines, f"{done} runs are done, {left} or more are to be done, in {self.out}"])

    def open(self, config: TrainConfig, model: LanguageModel) -> Documents:
        """The documents of config.data_file, as a run with this configuration reads them."""
        rows = data_of(config.data_file, config.data_type)[1] == "jsonl"
        named = ",".join(f"{ours}={theirs}" for ours, theirs in self.comparison.fields.items()) if rows else ""
        config = replace(config, fields=named, template=config.template if rows else "", format=config.format if rows else "auto")
        documents = TrainingData.open(replace(config, val_file="", val_split=0, val_every=0, patience=0), model).documents
        assert documents is not None
        return documents

    def open_other(self, name: str, shared: TrainConfig, model: LanguageModel) -> Documents:
        return self.open(replace(shared, data_type="auto", data_file=name, data_rows=""), model)

    def count_epochs(self, shared: TrainConfig) -> int:
        """The fewest epochs of equal length that make up the steps."""
        steps, data = self.comparison.steps, TrainingData.of_documents(self.documents, replace(shared, epoch_steps=0))
        there = data.steps_per_epoch(1)
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
        done = {}
        for number, line in enumerate(text[:whole].splitlines(), 1):
            try:
                record = json.loads(line)
                if not is_record(record):
                    raise ValueError
            except (ValueError, RecursionError):
                raise UserError(f"{self.file}, line {number} is damaged; remove it, and its run is repeated") from None
            done[record["key"]] = record
        return done

    def add(self, run: Run, result: dict[str, Any]) -> None:
        record = {"key": self.key(run), "label": run.entry.label, "method": run.entry.method, "options": dict(run.entry.options),
                  "lr": run.lr, "seed": run.seed, "date": datetime.datetime.now(datetime.timezone.utc).isoformat()[:19],
                  **result}  # fmt: skip
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise UserError(f"{self.file}: {error.strerror}; the runs before are kept") from None
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
        return to_do((self.base, *self.entries), c.seeds, c.extend, c.refine, chosen_by, c.one_rate)

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
                    self.keep(run)
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
        data = (run.entry.method == "base", self.documents, self.held_out, self.held_out_ids, self.general,
                self.comparison.general_documents)  # fmt: skip
        process = context.Process(target=one_run.child, args=(sender, config, *data), daemon=True)
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
            raise UserError(f"{name}: {result}; see {output}")
        return result

    def keep(self, run: Run) -> None:
        """What the run trained, into `trained`, if that is wanted."""
        trained = sorted(Path(self.config(run).proj_dir).glob(f"rwkv-{self.epochs - 1}.*"))
        if self.comparison.keep and trained:
            kept = self.out / "trained" / f"{run.entry.label}-{run.lr:g}-{run.seed}"
            kept.mkdir(parents=True, exist_ok=True)
            for path in trained:
                shutil.rmtree(kept / path.name, ignore_errors=True)
                shutil.move(path, kept / path.name)

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

    def at(self, entry: Entry, rate: float | None = None) -> list[dict[str, Any]]:
        """The records of an entry at a rate, or at its best so far, in the order of seeds; fewer where seeds are not done."""
        results, seeds = self.results(), self.comparison.seeds
        if not entry.lrs:
            rate = 0.0
        elif rate is None:
            chosen_by = {run: record["choosing_loss"] for run, record in results.items()}
            _, rate = sweep(entry, seeds[0], self.comparison.extend, self.comparison.refine, chosen_by)
        return [results[run] for run in (Run(entry, rate, seed) for seed in seeds) if run in results]
