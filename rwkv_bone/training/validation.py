"""Loss on held-out documents while a run goes on: each measure is a line of val_data.jsonl, the best adapter stays rwkv-best.pth.

Where a run that goes on stands (its best loss, how long ago that was) is read from the log, cut to the step it goes on from.
"""

import json
import math
from pathlib import Path

import lightning as L
import torch
from torch import Tensor

from ..config import TrainConfig
from ..terminal import counted
from .module import FineTune
from .progress import say
from .records import save_result

LOG = "val_data.jsonl"


class Validation(L.Callback):
    """Stands before Records among the callbacks: an early stop is a step that ends the run."""

    def __init__(self, config: TrainConfig):
        self.config, self.dir = config, Path(config.proj_dir)
        self.best, self.since = math.inf, 0  # lowest loss, and measures since

    def on_train_start(self, trainer: L.Trainer, module: FineTune) -> None:
        lines = (self.dir / LOG).read_text().splitlines() if module.step and (self.dir / LOG).exists() else []
        measures = [measure for measure in map(json.loads, lines) if measure["step"] <= module.step]
        for measure in measures:
            self.note(measure["loss"])
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            (self.dir / LOG).write_text("".join(json.dumps(measure) + "\n" for measure in measures))
        if self.config.patience and self.since >= self.config.patience:  # a run that ended early stays ended
            trainer.should_stop = True

    def note(self, loss: float) -> bool:
        """Whether that is the lowest loss so far."""
        better = loss < self.best
        self.best, self.since = (loss, 0) if better else (self.best, self.since + 1)
        return better

    def on_train_batch_end(self, trainer: L.Trainer, module: FineTune, outputs, batch, batch_idx) -> None:
        step, config = module.step, self.config
        every = config.val_every or module.data.steps_per_epoch(trainer.world_size)
        if step % every and step != module.total_steps:
            return
        loss, tokens = self.measure(trainer, module)
        better = self.note(loss)
        trained = module.engine.trained() if better else {}
        if trainer.is_global_zero:
            with (self.dir / LOG).open("a") as log:
                log.write(json.dumps({"step": step, "loss": loss, "tokens": tokens}) + "\n")
            note = "the best so far, kept as rwkv-best.pth" if better else f"best {self.best:.4f}"
            say(f"validation after step {step}: loss {loss:.4f} over {tokens:,} trained tokens, {note}")
            if better:
                save_result(self.dir / "rwkv-best.pth", trained, module, step)
        if config.patience and self.since >= config.patience and step != module.total_steps:
            module.ended_early = True
            if trainer.is_global_zero:
                say(f"no better for {counted(self.since, 'validation')}: the run ends here")

    @torch.no_grad()
    def measure(self, trainer: L.Trainer, module: FineTune) -> tuple[float, int]:
        """Mean loss over the trained tokens of the held-out documents, over all devices, and their number."""
        module.model.eval()
        total: float | Tensor = 0.0
        tokens: float | Tensor = 0
        for micro in module.data.held_out(trainer.global_rank, trainer.world_size):
            micro = module.transfer_batch_to_device(micro, module.device, 0)
            total = total + module.engine.forward(micro)[0]
            tokens = tokens + (micro["targets"] >= 0).sum()
        module.model.train()
        total, tokens = module.over_devices([total, tokens])
        return total / max(tokens, 1), int(tokens)
