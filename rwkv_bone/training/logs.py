"""What is logged of each step, and what a person sees meanwhile: a bar on a terminal, plain lines elsewhere.

`loss` is the same number wherever it stands; losses.py says what it is of a step, of a window and of an epoch.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from tqdm import tqdm

from ..config import TrainConfig
from ..errors import UserError
from ..terminal import clock, fitted
from . import samples
from .losses import RunningLoss
from .outputs import LOGS, RunFolder
from .samples import Sample

LINE_SECONDS = 10.0  # at least so long between two plain lines
FEW_EPOCHS = 20  # of more, not every one has a line
COLUMNS = ("step", "epoch", "loss", "lr", "grad_norm", "trained", "tokens", "val_loss")


class StepRecord(NamedTuple):
    """What one optimiser step did, over all devices."""

    step: int  # from 1
    epoch: int
    loss: float | None  # mean cross entropy over the trained tokens, nats; None where there are none
    lr: float
    grad_norm: float  # before clipping
    trained: int  # tokens with a loss
    tokens: int  # real tokens, padding not counted
    seconds: float

    def line(self) -> dict[str, Any]:
        """As loss_data.jsonl has it."""
        line = self._asdict()
        line["t_cost"] = line.pop("seconds")
        line["kt_s"] = self.tokens / self.seconds / 1000
        return line


def say(text: str) -> None:
    """A line of its own, above the bar where there is one."""
    tqdm.write("\n".join(map(fitted, text.split("\n"))))
    sys.stdout.flush()


class Logs:
    """The first device's log files and its progress display. `lengths` (bytes) cut the files to where a resumed run stood."""

    def __init__(self, folder: RunFolder, config: TrainConfig, step: int, total: int, lengths: dict[str, int] | None):
        names = [*LOGS, *([samples.FILE] if config.sample_prompt else [])]
        folder.claim(*names)
        self.files = {}
        for name in names:
            path = folder / name
            if lengths is not None and path.exists():
                os.truncate(path, min(path.stat().st_size, lengths.get(name, 0)))
            self.files[name] = path.open("a", newline="")
        if not self.files["metrics.csv"].tell():
            self.row(dict(zip(COLUMNS, COLUMNS)))
        if not self.files["train_log.txt"].tell():
            self.write("train_log.txt", "# epoch, loss, perplexity, learning rate, date, time, seconds")
        earlier = folder.lines("loss_data.jsonl")
        self.others = other_loggers(config, folder)
        for line in earlier:
            self.to_others({name: line[name] for name in ("loss", "lr", "grad_norm", "tokens")}, line["step"])
        for line in folder.lines("val_data.jsonl"):
            self.to_others({"val_loss": line["loss"]}, line["step"])
        self.start, self.total, self.stream = step, total, sys.stdout
        self.loss = RunningLoss((line["loss"], line["trained"]) for line in earlier)
        self.seconds = self.tokens = 0.0
        self.shown_at = self.epoch_seconds = 0.0
        self.epoch_shown_at = 0.0
        self.epochs, self.last_epoch = config.epoch_count, config.epoch_begin + config.epoch_count - 1
        self.held_out: tuple[int, float] = (0, 0.0)  # the last measure: after which step, loss
        self.bar = None
        if self.stream.isatty():
            shape = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
            self.bar = tqdm(total=total, initial=step, file=self.stream, dynamic_ncols=True, bar_format=shape)

    def write(self, name: str, line: str) -> None:
        try:
            self.files[name].write(line + "\n")
            self.files[name].flush()
        except OSError as error:
            cure = "--resume auto continues from what was saved"
            raise UserError(f"{self.files[name].name}: cannot be written ({error.strerror or error}); {cure}") from error

    def row(self, values: dict[str, Any]) -> None:
        """A row of metrics.csv; columns without a value stay empty."""
        self.write("metrics.csv", ",".join("" if values.get(name) is None else str(values[name]) for name in COLUMNS))

    def step(self, record: StepRecord) -> None:
        line = record.line()
        self.write("loss_data.jsonl", json.dumps(line))
        self.row(line)
        self.to_others({name: line[name] for name in ("loss", "lr", "grad_norm", "tokens")}, record.step)
        self.loss.add(record.loss, record.trained)
        self.epoch_seconds += record.seconds
        self.show(record)

    def validation(self, step: int, epoch: int, loss: float, tokens: int) -> None:
        """step: 0 for a measure before the first."""
        self.write("val_data.jsonl", json.dumps({"step": step, "epoch": epoch, "loss": loss, "tokens": tokens}))
        self.row({"step": step, "epoch": epoch, "val_loss": loss})
        self.to_others({"val_loss": loss}, step)
        self.held_out = (step, loss)

    def samples(self, answers: list[Sample]) -> None:
        for answer in answers:
            self.write(samples.FILE, json.dumps(answer._asdict()))
        say(samples.in_lines(answers))

    def epoch(self, record: StepRecord, loss: float) -> None:
        now, took = time.strftime("%Y-%m-%d %H:%M:%S"), self.epoch_seconds
        perplexity = math.exp(min(loss, 700))
        self.write("train_log.txt", f"{record.epoch} {loss:.6f} {perplexity:.4f} {record.lr:.8f} {now} {took:.1f}s")
        self.epoch_seconds = 0.0
        last = record.epoch == self.last_epoch
        if self.epochs <= FEW_EPOCHS or last or time.monotonic() - self.epoch_shown_at >= LINE_SECONDS:
            self.epoch_shown_at = time.monotonic()
            held_out = f", held out {self.held_out[1]:.4f}" if self.held_out[0] == record.step else ""
            say(f"epoch {record.epoch} ended with step {record.step}/{self.total}: loss {loss:.4f}{held_out}, in {clock(took)}")

    def show(self, record: StepRecord) -> None:
        """Loss over the last steps, learning rate, real tokens/s, time to go."""
        done = record.step - self.start
        if done > 1:  # the first step builds and warms up
            self.seconds += record.seconds
            self.tokens += record.tokens
        rate = self.tokens / self.seconds if self.seconds else record.tokens / record.seconds
        loss = "no trained token" if record.loss is None else f"loss {self.loss.value:.4f}"
        values = f"epoch {record.epoch}, {loss}, lr {record.lr:.3g}, {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.set_postfix_str(values, refresh=False)
            self.bar.update()
            return
        now = time.monotonic()
        if record.step in (self.start + 1, self.total) or now - self.shown_at >= LINE_SECONDS:
            self.shown_at = now
            each = self.seconds / (done - 1) if done > 1 else record.seconds
            left = clock(each * (self.total - record.step))
            print(f"step {record.step}/{self.total}, {values}, {left} to go", file=self.stream, flush=True)

    def to_others(self, values: dict[str, float | None], step: int) -> None:
        for log in self.others:
            log({name: value for name, value in values.items() if value is not None}, step)

    def lengths(self) -> dict[str, int]:
        """Bytes of each file, on disk."""
        for file in self.files.values():
            file.flush()
            os.fsync(file.fileno())
        return {name: os.fstat(file.fileno()).st_size for name, file in self.files.items()}

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        for file in self.files.values():
            file.close()


def other_loggers(config: TrainConfig, folder: RunFolder) -> list[Callable[[dict[str, float], int], None]]:
    """TensorBoard and Weights & Biases, where they were asked for and are installed."""
    loggers: list[Callable[[dict[str, float], int], None]] = []
    for name, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        if not wanted:
            continue
        try:
            if name == "wandb":
                import wandb

                run = wandb.init(project=config.wandb, dir=config.proj_dir, config=json.loads(config.to_json()))
                loggers.append(run.log)
            else:
                from torch.utils.tensorboard import SummaryWriter

                loggers.append(partial(add_scalars, SummaryWriter(str(folder / "tensorboard"))))
        except ImportError:  # the community's scripts pass --wandb: no reason not to train
            say(f"warning: --{name}: the package {name} is missing (pip install {name}); logging goes on without")
        except Exception as error:  # wandb without login or network raises errors of its own; a folder called wandb has no init
            why = (str(error).splitlines() or [type(error).__name__])[0]
            cure = " (WANDB_MODE=offline needs no network)" if name == "wandb" else ""
            say(f"warning: --{name}: {why}; logging goes on without{cure}")
    return loggers


def add_scalars(writer: Any, values: dict[str, float], step: int) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)
