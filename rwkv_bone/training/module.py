"""One optimiser step, as a LightningModule: micro batches forward and backward, clip, step, one line of record.

Lightning's own accumulation is not used: it divides by the number of micro batches, which is right only where all hold
equally many trained tokens. Here a "batch" is all micro batches of a step, and every token of the step weighs the same
over micro batches and devices.
"""

import math
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..config import TrainConfig
from ..errors import UserError
from ..models.x060 import RWKV, State
from . import resume
from .engines import DeepSpeedEngine, Engine
from .infctx import backward_in_chunks
from .loss import cross_entropy_sum
from .optimiser import make_optimiser
from .schedule import learning_rate


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


class FineTune(L.LightningModule):
    """Trains what of `model` requires a gradient. `data` gives loaders and the number of steps; see training/loader.py."""

    def __init__(self, model: RWKV, data, config: TrainConfig):
        super().__init__()
        self.automatic_optimization = False
        self.model = model
        self.data = data
        self.config = config
        self.step = 0  # optimiser steps done
        self.ended_early = False  # by validation
        self.record: StepRecord | None = None
        self.seed = config.random_seed if config.random_seed >= 0 else secrets.randbelow(2**31)  # the first device's counts
        self.stop_requested = 0  # signal number, on this device; agreed with the others at the end of each step
        self.save_requested = False
        self.stopping = self.saving = False  # agreed
        self.restored: tuple[dict[str, Any], dict[str, Any]] | None = None  # the checkpoint of a run that goes on

    @property
    def total_steps(self) -> int:
        return self.data.steps_per_epoch(self.trainer.world_size) * self.config.epoch_count

    def setup(self, stage: str) -> None:
        """Agree on where the run begins."""
        step, self.seed = self.trainer.strategy.broadcast((self.step, self.seed))
        if step != self.step:
            raise UserError(f"--resume: device {self.trainer.global_rank} finds step {self.step} in --proj_dir, the first device "
                            f"step {step}; all machines must see the same folder")  # fmt: skip
        self.data.check_trained(self.trainer.world_size, self.seed)
        self.engine = (DeepSpeedEngine if self.config.strategy.startswith("deepspeed") else Engine)(self)

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        return self.data.loader(trainer.global_rank, trainer.world_size, self.seed, self.step, self.total_steps)

    def configure_optimizers(self):
        return make_optimiser(self.model, self.config, masters=not self.engine.sharded)

    def on_train_start(self) -> None:
        self.step_began = time.perf_counter()

    def over_devices(self, values: list[float | Tensor]) -> list[float]:
        """Sums over all devices; one exchange."""
        tensor = torch.stack([torch.as_tensor(v, dtype=torch.float64, device=self.device) for v in values])
        return self.trainer.strategy.reduce(tensor, reduce_op="sum").tolist()

    def equal_lengths(self, micro_batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """Pad each micro batch to the longest of its number on any device: engines that share out want as many chunks on all."""
        lengths = torch.tensor([m["idx"].shape[1] for m in micro_batches], device=self.device)
        lengths = self.trainer.strategy.reduce(lengths, reduce_op="max")
        fill = {"idx": 0, "targets": -100, "reset": False}
        return [
            {name: F.pad(t, (0, longest - t.shape[1]), value=fill[name]) if name in fill else t for name, t in m.items()}
            for m, longest in zip(micro_batches, lengths.tolist())
        ]

    def forward(self, micro: dict[str, Tensor], state: State | None = None) -> tuple[Tensor, State]:
        """Summed loss over the trained tokens of a micro batch, and the state after it."""
        hidden, state = self.model.hidden(micro["idx"], state, micro.get("reset"))
        return cross_entropy_sum(hidden, self.model.head.weight, micro["targets"], self.config.l2wrap), state

    def backward_micro(self, micro: dict[str, Tensor], backward: Callable[[Tensor, bool], None]) -> Tensor:
        """Gradients of one micro batch; returns its summed loss."""
        config = self.config
        if config.train_type == "infctx":
            return backward_in_chunks(self.engine.forward, micro, config.chunk_ctx, config.truncate, backward)
        loss = self.engine.forward(micro)[0]
        backward(loss, True)
        return loss.detach()

    def training_step(self, micro_batches: list[dict[str, Tensor]], batch_idx: int) -> None:
        config, world = self.config, self.trainer.world_size
        optimiser = self.optimizers()
        assert not isinstance(optimiser, list)
        lr = learning_rate(
            self.step, self.total_steps, config.lr_schedule, config.lr_init, config.lr_final, config.warmup_steps
        )
        for group in optimiser.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        trained, tokens = self.over_devices(
            [sum((m["targets"] >= 0).sum() for m in micro_batches), sum(m["tokens"] for m in micro_batches)]
        )
        if config.train_type == "infctx" and self.engine.sharded:
            micro_batches = self.equal_lengths(micro_batches)
        loss_sum: float | Tensor = 0.0
        for i, micro in enumerate(micro_batches):

            def backward(loss: Tensor, last: bool, last_micro: bool = i == len(micro_batches) - 1) -> None:
                # devices average their gradients: times their number gives the sum
                self.engine.backward(loss * (world / max(trained, 1)), last and last_micro)

            loss_sum += self.backward_micro(micro, backward)
        loss_sum, stop, save = self.over_devices([loss_sum, self.stop_requested, self.save_requested])
        self.stopping, self.saving, self.save_requested = stop > 0, save > 0, False
        loss_mean = loss_sum / max(trained, 1)
        grad_norm = self.engine.step(config.grad_clip) if math.isfinite(loss_mean) else math.nan
        if not math.isfinite(grad_norm):
            saved = resume.steps_saved(Path(config.proj_dir))
            cure = "go on with --resume auto: what it saved is good" if saved else "begin anew (--overwrite): nothing is saved"
            raise UserError(
                f"step {self.step + 1}: loss {loss_mean}, gradient norm {grad_norm}, at learning rate {lr:.3g}"
                f"{not_finite_in(self.model, micro_batches)}; lower --lr_init or --grad_clip and {cure}"
            )
        self.step += 1
        now = time.perf_counter()
        epoch = config.epoch_begin + (self.step - 1) // self.data.steps_per_epoch(world)
        self.record = StepRecord(
            self.step, epoch, loss_mean if trained else None, lr, grad_norm, int(trained), int(tokens), now - self.step_began
        )
        self.step_began = now


@torch.no_grad()
def not_finite_in(model: RWKV, micro_batches: list[dict[str, Tensor]]) -> str:
    """Where the model first leaves the finite numbers: a trained tensor, a block's output, or nowhere seen. For a message."""
    for name, p in model.named_parameters():
        if p.requires_grad and not p.isfinite().all():
            return f", {name} is not finite"
    for micro in micro_batches:
        x = model.emb(micro["idx"])
        for i, block in enumerate(model.blocks):
            x, _ = block(x, None, micro.get("reset"), model.op)
            if not x.isfinite().all():
                return f", first not finite after blocks.{i}"
    return ""
