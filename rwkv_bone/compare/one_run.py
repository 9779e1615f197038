"""One run of a comparison: train, measure, answer. See compare.py."""

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import TrainConfig
from ..data.documents import Documents
from ..errors import UserError
from ..evaluate.loss import document_losses
from ..models.x060 import RWKV
from ..ops.float32 import set_matmul_backend
from ..training.fit import device_type, fit, precision, tokens_at_once
from ..training.loader import TrainingData
from ..training.run import adapt, make_model, mean_loss


class TimedData(TrainingData):
    """Notes the process's CPU time whenever a micro batch is made."""

    def __init__(self, documents: Documents, config: TrainConfig):
        self.clock: list[float] = []
        super().__init__(documents, config)

    def batches(self, *args, **options):
        batches = super().batches(*args, **options)
        collate = batches.collate

        def noted(rows):
            self.clock.append(time.process_time())
            return collate(rows)

        batches.collate = noted
        return batches

    def cpu_seconds(self) -> float:
        """CPU time of a step, the median."""
        each = [after - before for before, after in zip(self.clock, self.clock[1:])]
        return statistics.median(each or [0.0]) * self.config.accumulate_grad_batches


def peak_bytes(device: str) -> int:
    """The most memory that this process has held so far: on the GPU what torch has given out, else all that is resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def held_out_losses(model: RWKV, documents: Documents, ids: Sequence[int]) -> tuple[float, float]:
    """Mean loss per token of the documents `ids[0]`, `ids[2]`, ..., and that of `ids[1]`, `ids[3]`, ..."""
    model.eval()
    order = sorted(range(len(ids)), key=lambda place: -documents.sizes[ids[place]])
    halves = np.zeros((2, 2))  # [half, (nats, tokens)]
    for at in range(0, len(order), 8):
        places = order[at : at + 8]
        for place, found in zip(places, document_losses(model, [documents[ids[place]] for place in places], 512)):
            halves[place % 2] += found
    nats, tokens = halves.T
    if not tokens.all():
        raise UserError(f"{documents.name}: half of the {len(ids)} held-out documents hold no token to predict; take more")
    choosing, reported = (nats / tokens).tolist()
    return choosing, reported


def measure(config: TrainConfig, base: bool, documents: Documents, held_out: Documents, ids: Sequence[int]) -> dict[str, Any]:
    """Train as `config` says, or only read the same batches with the untrained model, and measure."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.random_seed)
    device = device_type(config)
    before = peak_bytes(device)
    model, data = make_model(config), TimedData(documents, config)
    losses, seconds, diverged = [], [], ""
    began = time.monotonic()
    if base:
        set_matmul_backend(device, tokens_at_once(data, config), precision(config) == "tf32")
        model.to(device).eval()
        with torch.no_grad():
            for step in data.loader(0, 1, config.random_seed, 0, data.steps_per_epoch(1) * config.epoch_count):
                micro = [{name: tensor.to(device) for name, tensor in m.items()} for m in step]
                weights = [int((m["targets"] >= 0).sum()) for m in micro]
                losses.append(sum(float(mean_loss(model, m)) * n for m, n in zip(micro, weights)) / max(sum(weights), 1))
    else:
        adapt(model, data, config)
        data.clock.clear()
        try:
            if code := fit(model, data, config):
                raise KeyboardInterrupt(code)
        except UserError as error:
            if not re.match(r"step \d+: loss ", str(error)):
                raise
            diverged = str(error)
        for line in (Path(config.proj_dir) / "loss_data.jsonl").read_text().splitlines():
            step = json.loads(line)
            losses.append(step["loss"] or 0.0)  # nothing was trained: as the base's above
            seconds.append(step["t_cost"])
    peak = peak_bytes(device) - before
    choosing, reported = (math.inf, math.inf) if diverged else held_out_losses(model.to(device), held_out, ids)
    return {
        "choosing_loss": choosing,
        "held_out_loss": reported,
        "trained": 0 if base else sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": statistics.median(seconds[1:] or seconds or [0.0]),  # the first one warms up
        "step_cpu_seconds": 0.0 if base else data.cpu_seconds(),
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": time.monotonic() - began,
        "diverged": diverged,
        "losses": losses,
    }


def end_with_parent() -> None:
    """A killed comparison leaves no run behind that would go on unseen."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def child(answer, config: TrainConfig, *data) -> None:
    """The process of one run: what it prints goes to a file in proj_dir; it answers ("ok", result) or (what went wrong, text)."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    with open(Path(config.proj_dir) / "output.txt", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        try:
            answer.send(("ok", measure(config, *data)))
        except UserError as error:
            answer.send(("refused", str(error)))
        except KeyboardInterrupt:
            answer.send(("stopped", ""))
        except Exception:  # told to the process that waits, which stops
            answer.send(("crashed", traceback.format_exc()))
