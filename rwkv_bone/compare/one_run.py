"""One run of a comparison: train, measure, answer. See study.py."""

import json
import math
import multiprocessing
import multiprocessing.connection
import os
import re
import statistics
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
from ..models import LanguageModel
from ..ops.float32 import set_matmul_backend
from ..training.ending import peak_bytes
from ..training.loader import TrainingData
from ..training.loop import fit, tokens_at_once
from ..training.objectives import OBJECTIVES, mean_loss
from ..training.run import adapt, make_model
from ..training.strategies import device_type, make_engine
from ..training.summary import precision

GENERAL_TOKENS = 1024  # of a document of `general`


class Clock:
    """Notes the process's CPU time whenever a micro batch is made of samples."""

    def __init__(self, data: TrainingData):
        self.times: list[float] = []
        self.collate, data.collate = data.collate, self.noted
        self.micro_batches = data.config.accumulate_grad_batches

    def noted(self, rows):
        self.times.append(time.process_time())
        return self.collate(rows)

    def cpu_seconds(self) -> float:
        """CPU time of a step, the median."""
        each = [after - before for before, after in zip(self.times, self.times[1:])]
        return statistics.median(each or [0.0]) * self.micro_batches


def held_out_losses(model: LanguageModel, documents: Documents, ids: Sequence[int]) -> tuple[float, float]:
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


def general_loss(model: LanguageModel, documents: Documents | None, count: int) -> float:
    """Mean loss per token of the beginnings of the first `count` documents; NaN where there are none."""
    if documents is None:
        return math.nan
    found = np.zeros(2)
    for at in range(0, min(count, len(documents)), 4):
        rows = [documents[i] for i in range(at, min(at + 4, count, len(documents)))]
        rows = [(tokens[: GENERAL_TOKENS + 1], np.ones(min(len(tokens), GENERAL_TOKENS + 1), bool)) for tokens, _ in rows]
        found += np.sum(document_losses(model, rows, 512), 0)
    return float(found[0] / found[1])


def measure(
    config: TrainConfig,
    base: bool,
    documents: Documents,
    held_out: Documents,
    ids: Sequence[int],
    general: Documents | None = None,
    general_documents: int = 0,
) -> dict[str, Any]:
    """Train as `config` says, or only read the same batches with the untrained model, and measure."""
    if config.threads:
        torch.set_num_threads(config.threads)
    torch.manual_seed(config.random_seed)
    device = device_type(config)
    before = peak_bytes(device)
    model, data = make_model(config), TrainingData.of_documents(documents, config)
    objective, engine, clock = OBJECTIVES[config.objective](config), make_engine(config), Clock(data)
    losses, tokens, seconds, diverged = [], [], [], ""
    began = time.monotonic()
    if base:
        set_matmul_backend(device, tokens_at_once(data, config), precision(config) == "tf32")
        model.to(device).eval()
        with torch.no_grad():
            for step in data.steps(0, 1, config.random_seed, 0, data.steps_per_epoch(1) * config.epoch_count):
                micro = [{name: tensor.to(device) for name, tensor in m.items()} for m in step]
                weights = [int(objective.count(m)) for m in micro]
                nats = sum(float(mean_loss(model, objective, m)) * n for m, n in zip(micro, weights))
                losses.append(nats / max(sum(weights), 1))
                tokens.append(sum(weights))
    else:
        config = adapt(model, data, objective, config, engine)
        clock.times.clear()
        try:
            if code := fit(model, data, objective, config, engine):
                raise KeyboardInterrupt(code)
        except UserError as error:
            if not re.match(r"step \d+: loss ", str(error)):
                raise
            diverged = str(error)
        for line in (Path(config.proj_dir) / "loss_data.jsonl").read_text().splitlines():
            step = json.loads(line)
            losses.append(step["loss"] or 0.0)  # nothing was trained: as the base's above
            tokens.append(step["trained"])
            seconds.append(step["t_cost"])
    peak = peak_bytes(device) - before
    choosing = reported = forgotten = math.inf
    if not diverged:
        choosing, reported = held_out_losses(model.to(device), held_out, ids)
        forgotten = general_loss(model, general, general_documents)
    return {
        "choosing_loss": choosing,
        "held_out_loss": reported,
        "general_loss": forgotten if math.isfinite(forgotten) else None,
        "trained": 0 if base else sum(p.numel() for p in model.parameters() if p.requires_grad),
        "step_seconds": statistics.median(seconds[1:] or seconds or [0.0]),  # the first one warms up
        "step_cpu_seconds": 0.0 if base else clock.cpu_seconds(),
        "peak_bytes": peak,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "seconds": time.monotonic() - began,
        "diverged": diverged,
        "losses": losses,
        "step_tokens": tokens,  # trained ones, the weights of the losses
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
        except Exception as error:  # told to the process that waits, which stops
            traceback.print_exc()
            answer.send(("crashed", f"{type(error).__name__}: {error}"))
