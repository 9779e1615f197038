"""The files of a run in its folder (`--proj_dir`), and the record of which these are.

    rwkv-N.pth, rwkv-N.json   the adapter (or, with --peft none, the model) after epoch N, and its sidecar
    rwkv-best, -interrupted   the same at the lowest validation loss, and where a signal ended the run
    checkpoints/              what --resume auto continues from, see resume.py
    loss_data.jsonl, val_data.jsonl, metrics.csv: a line a step or validation;   train_log.txt: a line an epoch
    samples.jsonl             a line an answer to --sample_prompt
    config.json, loss.png, report.html
    run_files.json            the names of all of these that a run made here, and its processes

A run changes and removes only files that are named in the record, and writes a name there before it makes the file. So nothing
that a user put into the folder is ever lost, and a file that was given as input is never touched wherever it lies.
"""

import glob
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import TrainConfig
from ..errors import UserError
from ..files.adapters import save_adapter, sidecar
from ..files.models import about_record, identity
from ..files.pth import layout_of, write_pth
from ..models import LanguageModel

RECORD = "run_files.json"
INTERRUPTED, BEST = "rwkv-interrupted.pth", "rwkv-best.pth"
LOGS = ("loss_data.jsonl", "val_data.jsonl", "train_log.txt", "metrics.csv")


def result_due(config: TrainConfig, epoch: int) -> bool:
    """Whether rwkv-N.pth is written after that epoch."""
    done = epoch - config.epoch_begin + 1
    return done % config.epoch_save == 0 or done == config.epoch_count


def planned(config: TrainConfig) -> list[str]:
    """The names that a run may write directly in its folder, its step checkpoints aside."""
    epochs = range(config.epoch_begin, config.epoch_begin + config.epoch_count)
    results = [f"rwkv-{epoch}.pth" for epoch in epochs if result_due(config, epoch)] + [BEST, INTERRUPTED]
    return [*results, *(str(sidecar(name)) for name in results), *LOGS, "samples.jsonl", "config.json", "loss.png", "report.html"]


def numbered(folder: "RunFolder", config: TrainConfig) -> list[str]:
    """The rwkv-N.pth of this run's epochs that are there, in order."""
    epochs = range(config.epoch_begin, config.epoch_begin + config.epoch_count)
    return [name for name in (f"rwkv-{epoch}.pth" for epoch in epochs) if name in folder.files and (folder / name).exists()]


class RunFolder:
    """`--proj_dir`, with the record of what runs made in it."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.files: list[str] = []
        self.pids: list[int] = []
        self.finished = False
        try:
            record = json.loads((self.path / RECORD).read_bytes())
            names, pids, finished = record["files"], record["pids"], record["finished"]
            if all(isinstance(n, str) for n in names) and all(type(p) is int for p in pids) and type(finished) is bool:
                self.files, self.pids, self.finished = names, pids, finished
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            pass  # none, or not ours: then no file here is ours

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def lines(self, name: str) -> list[dict[str, Any]]:
        """What the log `name` holds; nothing where it is not there."""
        path = self.path / name
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def save(self) -> None:
        new = self.path / f"{RECORD}.new"  # one name, whatever process is killed here: the next one writes over it
        try:
            with open(new, "w") as file:
                json.dump({"finished": self.finished, "pids": self.pids, "files": self.files}, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.path / RECORD)
        except OSError as error:
            raise UserError(f"{self.path / RECORD}: cannot be written ({error.strerror or error})") from error

    def claim(self, *names: str) -> None:
        """Name files as this run's own, before they are made. UserError for one that is there and was made by nobody known."""
        new = [name for name in names if name not in self.files]
        for name in new:
            if os.path.lexists(self.path / name):
                raise UserError(f"{self.path / name} exists and is not a file of a run in this folder; give another --proj_dir")
        if new:
            self.files += new
            self.save()

    def remove(self, names: Iterable[str]) -> None:
        """Remove files of the record, with what a killed process left of them half written."""
        gone = set()
        for name in names:
            if name in self.files:
                (self.path / name).unlink(missing_ok=True)
                gone.add(name)
        if gone:
            self.files = [name for name in self.files if name not in gone]
            self.save()

    def remove_half_written(self) -> None:
        """What killed processes of the record left of its files."""
        for name in self.files:
            for pid in self.pids:
                left = self.path / f"{name}.{pid}.tmp"
                if left.is_file():
                    left.unlink()

    def begin(self, config: TrainConfig, pids: list[int], anew: bool) -> None:
        """Take the folder into use; `anew`: without what an earlier run left in it. Inputs of the run stay as they are."""
        inputs = inputs_of(config)
        for name in planned(config):
            same = [given for given in inputs if os.path.exists(self / name) and os.path.samefile(given, self / name)]
            if same:
                cure = "give another --proj_dir or --epoch_begin"
                raise UserError(f"{same[0]} is an input of this run, which would write a file of that name; {cure}")
        if anew:
            kept = [n for n in self.files if any(os.path.exists(self / n) and os.path.samefile(g, self / n) for g in inputs)]
            self.remove([name for name in self.files if name not in kept])
        self.remove_half_written()
        clash = [name for name in planned(config) if name not in self.files and os.path.lexists(self / name)]
        if clash:
            raise UserError(f"{self / clash[0]} exists and is not a file of a run in this folder; give another --proj_dir")
        self.pids, self.finished = sorted({*self.pids, *pids}), False
        self.save()

    def finish(self) -> None:
        self.remove_half_written()  # by a process that was killed at the very end
        if not self.finished:
            self.finished = True
            self.save()


def inputs_of(config: TrainConfig) -> list[str]:
    """The files that the user named as inputs, those that exist."""
    named = [config.load_model, config.peft_checkpoint, config.peft_init, config.vocab_file, config.tokenizer, config.template]
    if config.peft_checkpoint:
        named.append(str(sidecar(config.peft_checkpoint)))
    files = [path for path in named if path]
    if os.path.isdir(config.load_model):
        files += [entry.path for entry in os.scandir(config.load_model)]
    for data in (config.data_file, config.val_file):
        for pattern in data.split(","):
            ends = ("", ".bin", ".idx", ".mask.bin", "_text_document.bin", "_text_document.idx")
            names = [pattern + end for end in ends]
            files += [path for name in names if pattern for path in (glob.glob(name, recursive=True) or [name])]
    return [path for path in files if os.path.isfile(path)]


# ---------------------------------------------------------------- results


def adapter_info(model: LanguageModel, data: Any, config: TrainConfig, step: int) -> dict[str, Any]:
    """The sidecar: everything that the adapter's tensors do not say."""
    known = data.tokenizer and (data.read_text or config.tokenizer != "auto")
    return {
        "method": config.peft,
        "options": config.peft_options,
        "parts": list(config.parts),
        "train_parts": list(config.train_parts),
        "step": step,
        "base": identity(config.load_model, model),
        **({"quant": config.quant} if config.quant != "none" else {}),
        **({"tokenizer": data.tokenizer.identity()} if known else {}),
        **({"template": data.template.identity()} if data.template else {}),
    }


def save_result(
    path: Path, trained: dict[str, Tensor], model: LanguageModel, data: Any, config: TrainConfig, step: int
) -> None:
    """The adapter (or the initial states) with its sidecar, or with --peft none the whole model.

    A model that its tensors alone do not tell is saved as an adapter that changes all of the base.
    """
    if config.peft == "none" and config.train_type != "state" and type(model).recognises(trained):
        tensors = {name: tensor.to(model.file_dtype) for name, tensor in trained.items()}
        write_pth(path, layout_of(tensors), tensors.items(), about_record(adapter_info(model, data, config, step)))
    else:
        save_adapter(path, trained, adapter_info(model, data, config, step))
