"""What a run leaves behind: adapters, step checkpoints, and logs. One callback, after each optimiser step.

    rwkv-N.pth, rwkv-N.json   the adapter (or, with --peft none, the model) after epoch N, and its sidecar
    checkpoints/step-S.ckpt   what --resume auto goes on from
    loss_data.jsonl           a line a step;   train_log.txt: a line an epoch;   metrics/: Lightning's CSV log
"""

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ..config import TrainConfig
from ..files.adapters import save_adapter, sidecar
from ..files.pth import save_tensors
from ..peft import adapter_tensors
from . import resume
from .module import FineTune, StepRecord
from .progress import Progress, say

LOGS = ("loss_data.jsonl", "train_log.txt")
INTERRUPTED = "rwkv-interrupted.pth"  # the same where a signal ended the run; the end of a run that went on removes it
ECHO_SECONDS = 2.0  # within which a second signal is the first one's echo: of a key, or of a launcher that passes it on
STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SIGUSR1: what a SLURM job asks to be sent before its time is up


def result_due(config: TrainConfig, epoch: int) -> bool:
    """Whether rwkv-N.pth is written after that epoch."""
    done = epoch - config.epoch_begin + 1
    return done % config.epoch_save == 0 or done == config.epoch_count


def adapter_info(module: FineTune, step: int) -> dict[str, Any]:
    """The sidecar: everything that the adapter's tensors do not say."""
    model, config, tokenizer = module.model, module.config, module.data.read_by
    return {
        "method": config.peft,
        "options": config.peft_options,
        "parts": list(config.parts),
        "train_parts": list(config.train_parts),
        "step": step,
        "base": {
            "file": Path(config.load_model).name,
            "fingerprint": model.fingerprint,
            "sizes": dataclasses.asdict(model.config),
        },
        **({"quant": config.quant} if config.quant != "none" else {}),
        **({"tokenizer": tokenizer.identity()} if tokenizer else {}),
        **({"template": module.data.template.identity()} if module.data.template else {}),
    }


def save_result(path: Path, trained: dict[str, Tensor], module: FineTune, step: int) -> None:
    """The adapter (or the initial states) with its sidecar, or with --peft none the whole model."""
    if module.config.peft == "none" and module.config.train_type != "state":
        save_tensors(path, {name: tensor.to(module.model.file_dtype) for name, tensor in trained.items()})
    else:
        save_adapter(path, trained, adapter_info(module, step))


class Records(L.Callback):
    def __init__(self, config: TrainConfig):
        self.config = config
        self.geometry: dict[str, Any] = {}  # what must be alike when the run goes on
        self.dir = Path(config.proj_dir)
        self.saved_at = time.monotonic()
        self.epoch_loss = self.epoch_trained = 0.0
        self.interrupted = False

    # -------------------------------------------------- start and end

    def on_train_start(self, trainer: L.Trainer, module: FineTune) -> None:
        self.rank_zero = trainer.is_global_zero
        self.epoch_began = time.time()
        if self.rank_zero:
            self.open_logs(trainer, module)
        if module.restored is not None:
            run, own = module.restored
            self.epoch_loss, self.epoch_trained = run["epoch_sums"]
            module.engine.load_optimiser_state((own if module.engine.sharded else run["own"])["optimiser"])
            resume.set_random_state(own["random"])
            module.restored = None
        elif trainer.global_rank:  # each device drops other units
            torch.manual_seed(module.seed + trainer.global_rank)
        self.handlers = {s: signal.signal(s, self.ask_to_stop(module)) for s in STOP}

    def open_logs(self, trainer: L.Trainer, module: FineTune) -> None:
        """Cut the logs to where a restored run stood; Lightning's, which begins a new file each time, gets all rows before."""
        self.logs = {}
        for name in LOGS:
            path = self.dir / name
            if module.restored is not None and path.exists():
                os.truncate(path, min(path.stat().st_size, module.restored[0]["log_bytes"][name]))
            self.logs[name] = path.open("a")
        for line in (self.dir / "loss_data.jsonl").read_text().splitlines():
            self.to_loggers(trainer, json.loads(line))
        self.progress = Progress(module.step, module.total_steps)

    def ask_to_stop(self, module: FineTune):
        def handler(number, frame):
            if not module.stop_requested:
                module.stop_requested, self.asked_at = number, time.monotonic()
                print(f"\n{signal.Signals(number).name}: saving after this step (a second one ends it without)", flush=True)
            elif time.monotonic() - self.asked_at > ECHO_SECONDS:
                print("ended without saving; --resume auto goes on from the last checkpoint", flush=True)
                raise SystemExit(128 + number)

        return handler

    def teardown(self, trainer: L.Trainer, module: FineTune, stage: str) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)
        if hasattr(self, "progress"):
            self.progress.close()
            for log in self.logs.values():
                log.close()

    # -------------------------------------------------- each step

    def on_train_batch_end(self, trainer: L.Trainer, module: FineTune, outputs, batch, batch_idx) -> None:
        record, config = module.record, self.config
        assert record is not None  # a step is done
        self.epoch_loss += (record.loss or 0.0) * record.trained
        self.epoch_trained += record.trained
        if self.rank_zero:
            line = record._asdict()
            line["t_cost"] = line.pop("seconds")
            line["kt_s"] = record.tokens / record.seconds / 1000
            self.write("loss_data.jsonl", json.dumps(line))
            self.to_loggers(trainer, line)
            self.progress.update(record)
            if config.load_model and not self.progress.start and self.progress.losses == 1 and record.loss is not None:
                self.doubt_the_tokenizer(record.loss, module.model.config.vocab_size)
        finished = record.step == module.total_steps or module.ended_early
        epoch_ended = finished or record.step % module.data.steps_per_epoch(trainer.world_size) == 0
        if epoch_ended:
            self.end_epoch(record)
        due = config.save_every_steps and record.step % config.save_every_steps == 0
        if epoch_ended or due or module.saving or module.stopping:
            self.save_step(trainer, module)
        if config.save_every_minutes and time.monotonic() - self.saved_at > 60 * config.save_every_minutes:
            module.save_requested = self.rank_zero
        # after the checkpoint: where there is a result, there is what --resume needs to know that it is one
        if epoch_ended and (finished or result_due(config, record.epoch)):
            self.save_result(module, f"rwkv-{record.epoch}.pth")
        if finished and self.rank_zero:  # what an earlier, interrupted part of this run left is outdone
            for path in (interrupted := self.dir / INTERRUPTED, sidecar(interrupted)):
                path.unlink(missing_ok=True)
        if module.stopping and not finished:
            self.interrupted = True
            path = self.save_result(module, INTERRUPTED)
            if self.rank_zero:
                say(f"stopped after step {module.step}; saved {path}; --resume auto goes on from here")
            trainer.should_stop = True
        trainer.should_stop = trainer.should_stop or module.ended_early
        if finished or self.interrupted:
            trainer.strategy.barrier()  # a launcher that sees one device end may end the others, and the first still writes

    def write(self, name: str, line: str) -> None:
        self.logs[name].write(line + "\n")
        self.logs[name].flush()

    @staticmethod
    def doubt_the_tokenizer(loss: float, vocab_size: int) -> None:
        """A trained model that does worse than one that knows nothing reads tokens that are not its own."""
        guessing = math.log(vocab_size)
        if loss > 1.1 * guessing:
            say(f"warning: the first loss, {loss:.2f}, is above that of guessing, {guessing:.2f}: was the model trained "
                "with another tokenizer? (--tokenizer, --vocab_file, --encoding)")  # fmt: skip

    def to_loggers(self, trainer: L.Trainer, line: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            values = {name: line[name] for name in ("loss", "lr", "grad_norm", "tokens") if line[name] is not None}
            logger.log_metrics(values, line["step"])

    def end_epoch(self, record: StepRecord) -> None:
        loss = self.epoch_loss / self.epoch_trained if self.epoch_trained else math.nan
        self.epoch_loss = self.epoch_trained = 0.0
        if self.rank_zero:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            took = time.time() - self.epoch_began
            perplexity = math.exp(min(loss, 700))
            self.write("train_log.txt", f"{record.epoch} {loss:.6f} {perplexity:.4f} {record.lr:.8f} {now} {took:.1f}s")
        self.epoch_began = time.time()

    def save_step(self, trainer: L.Trainer, module: FineTune) -> None:
        engine, rank = module.engine, trainer.global_rank
        trained = engine.trained()
        own = {"random": resume.random_state()}
        if engine.sharded or self.rank_zero:
            own["optimiser"] = engine.optimiser_state()
        run = {}
        if self.rank_zero:
            for log in self.logs.values():
                os.fsync(log.fileno())
            run = {
                "step": module.step,
                "geometry": self.geometry,
                "trained": trained,
                "log_bytes": {name: log.tell() for name, log in self.logs.items()},
                "epoch_sums": [self.epoch_loss, self.epoch_trained],
                "seed": module.seed,
            }
        resume.save(self.dir, module.step, run, own, rank, trainer.strategy.barrier, self.config.keep_last)
        self.saved_at = time.monotonic()

    def complete_epoch(self, module: FineTune, epoch: int, step: int) -> None:
        """Write the result of an epoch that was stopped between its checkpoint and its result."""
        path = self.dir / f"rwkv-{epoch}.pth"
        whole = path.exists() and (sidecar(path).exists() or self.config.peft == "none")
        if result_due(self.config, epoch) and not whole:
            save_result(path, adapter_tensors(module.model), module, step)

    def save_result(self, module: FineTune, name: str) -> Path:
        trained = module.engine.trained()
        if self.rank_zero:
            save_result(self.dir / name, trained, module, module.step)
        return self.dir / name
