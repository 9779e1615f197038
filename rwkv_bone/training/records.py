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
import torch.distributed

from ..checkpoint import save_adapter, save_tensors
from ..config import TrainConfig
from ..models.x060 import RWKV
from ..peft import adapter_tensors
from . import resume
from .module import FineTune, StepRecord
from .progress import Progress


def adapter_info(model: RWKV, config: TrainConfig, step: int) -> dict[str, Any]:
    """The sidecar: everything that the adapter's tensors do not say."""
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
    }


def save_result(path: Path, model: RWKV, config: TrainConfig, step: int) -> None:
    """The adapter with its sidecar, or with --peft none the whole model."""
    if config.peft == "none":
        save_tensors(path, model.state_dict())
    else:
        save_adapter(path, adapter_tensors(model), adapter_info(model, config, step))


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
        self.handlers = {s: signal.signal(s, self.ask_to_stop(module)) for s in (signal.SIGINT, signal.SIGTERM)}
        self.epoch_began = time.time()
        if module.restored is not None:
            self.epoch_loss, self.epoch_trained = module.restored["epoch_sums"]
            resume.set_random_state(module.restored["random"][trainer.global_rank])
            module.restored = None
        self.rank_zero = trainer.is_global_zero
        if self.rank_zero:
            self.progress = Progress(module.step, module.total_steps)
            self.log = (self.dir / "loss_data.jsonl").open("a")

    def ask_to_stop(self, module: FineTune):
        def handler(number, frame):
            if module.stop_requested:  # asked twice: at once
                raise KeyboardInterrupt
            module.stop_requested = True
            print(f"\n{signal.Signals(number).name}: saving after this step", flush=True)

        return handler

    def teardown(self, trainer: L.Trainer, module: FineTune, stage: str) -> None:
        for number, handler in getattr(self, "handlers", {}).items():
            signal.signal(number, handler)
        if hasattr(self, "progress"):
            self.progress.close()
            self.log.close()

    # -------------------------------------------------- each step

    def on_train_batch_end(self, trainer: L.Trainer, module: FineTune, outputs, batch, batch_idx) -> None:
        record, config = module.record, self.config
        self.epoch_loss += record.loss * record.trained
        self.epoch_trained += record.trained
        if self.rank_zero:
            self.write_line(record)
            trainer.logger.log_metrics(
                {"loss": record.loss, "lr": record.lr, "grad_norm": record.grad_norm, "tokens": record.tokens}, record.step
            )
            self.progress.update(record)
        steps = module.data.steps_per_epoch(trainer.world_size)
        epoch_ended = record.step % steps == 0
        finished = record.step == module.total_steps
        if epoch_ended:
            self.end_epoch(trainer, module, finished)
        due = config.save_every_steps and record.step % config.save_every_steps == 0
        if epoch_ended or due or module.saving or module.stopping:
            self.save_step(trainer, module)
        if config.save_every_minutes and time.monotonic() - self.saved_at > 60 * config.save_every_minutes:
            module.save_requested = self.rank_zero
        if module.stopping and not finished:
            self.interrupted = True
            if self.rank_zero:
                path = self.dir / "rwkv-interrupted.pth"
                save_result(path, module.model, config, module.step)
                print(f"stopped after step {module.step}; saved {path}; --resume auto goes on from here", flush=True)
            trainer.should_stop = True

    def write_line(self, record: StepRecord) -> None:
        line = {
            "step": record.step,
            "epoch": record.epoch,
            "loss": record.loss,
            "lr": record.lr,
            "t_cost": record.seconds,
            "kt_s": record.tokens / record.seconds / 1000,
            "tokens": record.tokens,
            "trained": record.trained,
        }
        self.log.write(json.dumps(line) + "\n")
        self.log.flush()

    def end_epoch(self, trainer: L.Trainer, module: FineTune, finished: bool) -> None:
        record, config = module.record, self.config
        loss = self.epoch_loss / max(self.epoch_trained, 1)
        self.epoch_loss = self.epoch_trained = 0.0
        done = record.epoch - config.epoch_begin + 1
        if self.rank_zero:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            took = time.time() - self.epoch_began
            with open(self.dir / "train_log.txt", "a") as file:
                file.write(f"{record.epoch} {loss:.6f} {math.exp(min(loss, 700)):.4f} {record.lr:.8f} {now} {took:.1f}s\n")
            if done % config.epoch_save == 0 or finished:
                save_result(self.dir / f"rwkv-{record.epoch}.pth", module.model, config, module.step)
        self.epoch_began = time.time()

    def save_step(self, trainer: L.Trainer, module: FineTune) -> None:
        random = [resume.random_state()]
        if trainer.world_size > 1:
            random = [None] * trainer.world_size
            torch.distributed.all_gather_object(random, resume.random_state())
        self.saved_at = time.monotonic()
        if not self.rank_zero:
            return
        os.fsync(self.log.fileno())
        state = {
            "step": module.step,
            "geometry": self.geometry,
            "trained": adapter_tensors(module.model),
            "optimiser": module.optimizers().optimizer.state_dict(),
            "random": random,
            "log_bytes": self.log.tell(),
            "epoch_sums": [self.epoch_loss, self.epoch_trained],
        }
        resume.save_step(self.dir, state, self.config.keep_last)
