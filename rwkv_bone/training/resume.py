"""Step checkpoints: all that a run needs to be resumed as if it had never stopped, and no more.

    checkpoints/step-00000123.ckpt          the run: what trains, lengths of the logs, ...; and what is the first device's own
    checkpoints/step-00000123.rank-1.ckpt   what is the second's: random numbers, its part of a divided optimiser; and so on

Where in the data a run stands follows from the step. A file appears under its name when it is whole, and the first device's
comes last: a checkpoint that has it has all. It goes first when the checkpoint is dropped.
"""

import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import TrainConfig
from ..errors import UserError
from ..files.atomic import atomic
from ..files.pth import check_sums, reason
from ..models import LanguageModel
from ..peft import adapter_tensors
from .outputs import RunFolder
from .strategies import Engine
from .validation import Best

# Flags that decide which samples a step holds, which of their tokens are trained, and what is trained.
INVARIANT_FLAGS = (
    "objective optim quant micro_bsz accumulate_grad_batches ctx_len dataload data_shuffle random_seed epoch_steps repeat_data "
    "loss_mask loss_marks data_rows tokenizer encoding fields template format train_type truncate val_split peft peft_options"
).split()


def invariants(model: LanguageModel, data: Any, config: TrainConfig, world: int) -> dict[str, Any]:
    """What a run can be resumed with alone."""
    sharded = config.strategy if config.strategy.startswith("deepspeed") else "auto"
    flags = {f"--{name}": getattr(config, name) for name in INVARIANT_FLAGS}
    return {"devices": world, "strategy": sharded, "base": model.fingerprint, **flags, **data.invariants()}


@dataclass
class Progress:
    """Where a run stands."""

    seed: int
    step: int = 0
    best: Best = field(default_factory=Best)  # held-out loss
    epoch_loss: float = 0.0  # of the epoch so far, summed over
    epoch_trained: float = 0.0  # so many trained tokens

    def worse_for(self, patience: int) -> bool:
        """Whether the last `patience` validations (0: any number is endured) were all worse than the best."""
        return 0 < patience <= self.best.since


def restore(
    model: LanguageModel, data: Any, folder: RunFolder, config: TrainConfig, engine: Engine
) -> tuple[Progress, tuple[dict[str, Any], dict[str, Any]] | None]:
    """Where the run begins, on all devices, and the checkpoint (see `newest`) whose trained tensors are in the model now."""
    at = Progress(config.random_seed if config.random_seed >= 0 else secrets.randbelow(2**31))
    checkpoint = newest(folder, engine.rank) if config.resume else None
    if checkpoint is not None:
        run, _ = checkpoint
        check_invariants(run["invariants"], invariants(model, data, config, engine.world))
        restore_trained(model, run["trained"])
        at = Progress(run["seed"], run["step"], Best.of_log(folder, run["step"]), *run["epoch_sums"])
    agreed, at.seed = engine.broadcast((at.step, at.seed))
    if agreed != at.step:
        raise UserError(f"--resume: device {engine.rank} finds step {at.step} in --proj_dir, the first device step {agreed}; "
                        "all machines must see the same folder")  # fmt: skip
    return at, checkpoint


def check_invariants(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        if name in now and now[name] != value:
            raise UserError(f"--resume: the run was begun with {name} {value!r}, not {now[name]!r}; give what it began with")


def name_of(step: int, rank: int = 0) -> str:
    """Within the run's folder."""
    return f"checkpoints/step-{step:08d}" + (f".rank-{rank}.ckpt" if rank else ".ckpt")


def steps_saved(folder: RunFolder) -> list[int]:
    """Steps of which there is a checkpoint of this folder's own, the newest first."""
    names = [re.fullmatch(r"checkpoints/step-(\d+)\.ckpt", name) for name in folder.files if (folder / name).is_file()]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def newest(folder: RunFolder, rank: int = 0) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint that is whole on every device: the run's state and that of device `rank`. None if there is none.

    A damaged one is passed over with a warning. If all are damaged, that is an error.
    """
    steps = steps_saved(folder)
    for step in steps:
        try:
            run = load_state(folder / name_of(step))
            if not is_run(run, step):
                raise TypeError
            devices = run["invariants"]["devices"]
            for other in range(1, devices):
                check_sums(folder / name_of(step, other))
            return run, load_state(folder / name_of(step, rank)) if 0 < rank < devices else run["own"]
        except (UserError, KeyError, TypeError) as error:
            if rank == 0:
                what = error if isinstance(error, UserError) else f"{folder / name_of(step)}: not a checkpoint of this program"
                print(f"warning: {what}; taking the checkpoint before", file=sys.stderr)
    if steps:
        cure = "--overwrite without --resume begins anew"
        raise UserError(f"{folder / 'checkpoints'}: none of {len(steps)} checkpoints is whole; {cure}")
    return None


def is_run(state: Mapping[str, Any], step: int) -> bool:
    """Whether a file's content is the first device's part of the checkpoint of step `step`, by its types."""
    kinds = {"step": int, "seed": int, "invariants": dict, "trained": dict, "own": dict, "log_bytes": dict, "epoch_sums": list}
    if any(type(state.get(name)) is not kind for name, kind in kinds.items()) or state["step"] != step or state["seed"] < 0:
        return False
    plain = (*state["invariants"].values(), *state["log_bytes"].values(), *state["epoch_sums"])
    named = [name for part in ("invariants", "trained", "log_bytes") for name in state[part]]
    return (
        all(isinstance(t, torch.Tensor) for t in state["trained"].values())
        and all(isinstance(value, str | int | float | tuple | list | dict) for value in plain)
        and all(isinstance(name, str) for name in named)
        and len(state["epoch_sums"]) == 2
    )


def save(
    folder: RunFolder, model: LanguageModel, data: Any, config: TrainConfig, engine: Engine, at: Progress, log_bytes: dict
) -> None:
    """Write one checkpoint, each device what is its own, the first also the run; then drop all but the newest."""
    trained = engine.trained()
    own: dict[str, Any] = {"random": random_state()}
    if engine.sharded or engine.first:
        own["optimiser"] = engine.optimiser_state()
    if engine.first:
        folder.claim(*(name_of(at.step, rank) for rank in reversed(range(engine.world))))
    engine.barrier()
    if not engine.first:
        save_state(folder / name_of(at.step, engine.rank), own)
    engine.barrier()
    if engine.first:
        run = {
            "step": at.step,
            "invariants": invariants(model, data, config, engine.world),
            "trained": trained,
            "log_bytes": log_bytes,
            "epoch_sums": [at.epoch_loss, at.epoch_trained],
            "seed": at.seed,
        }
        save_state(folder / name_of(at.step), {**run, "own": own})
        for old in steps_saved(folder)[config.keep_last :]:
            folder.remove(of_step(folder, old))


def of_step(folder: RunFolder, step: int) -> list[str]:
    """The files of one checkpoint, the first device's first."""
    return sorted((name for name in folder.files if re.match(rf"checkpoints/step-{step:08d}\.", name)), key=len)


def clear(folder: RunFolder, after: int) -> None:
    """Remove checkpoints beyond step `after`, and parts of one that is not whole."""
    whole = {step for step in steps_saved(folder) if step <= after}
    names = {name: re.match(r"checkpoints/step-(\d+)\.", name) for name in folder.files}
    folder.remove([name for name, match in names.items() if match and int(match[1]) not in whole])


def restore_optimiser(engine: Engine, run: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """The optimiser's state and the random numbers of this device."""
    try:
        engine.load_optimiser_state((own if engine.sharded else run["own"])["optimiser"])
        for parameter, state in () if engine.sharded else engine.optimiser.state.items():
            if odd := [t for t in state.values() if isinstance(t, torch.Tensor) and t.numel() > 1 and t.shape != parameter.shape]:
                raise ValueError(f"{tuple(odd[0].shape)} for {tuple(parameter.shape)}")
        set_random_state(own["random"])
    except Exception as error:  # whatever torch raises of a state of another shape
        what = f"the checkpoint of step {run['step']} does not fit this run ({reason(error)})"
        raise UserError(f"--resume: {what}; remove it, and the one before is taken") from None


def random_state() -> dict[str, Any]:
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])


@torch.no_grad()
def restore_trained(model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    """Put a checkpoint's tensors into a model that is set up alike; every one must find its place."""
    now = adapter_tensors(model)
    if {name: t.shape for name, t in now.items()} != {name: t.shape for name, t in tensors.items()}:
        odd = sorted(set(now) ^ set(tensors))[:3] or ["shapes differ"]
        raise UserError(f"--resume: the run was begun with another method or options ({', '.join(odd)}); give its flags")
    for name, tensor in now.items():
        tensor.copy_(tensors[name])


def save_state(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write nested dicts and lists of tensors and plain values."""
    try:
        with atomic(path) as file:
            torch.save(dict(state), file)
    except RuntimeError as error:  # so torch reports a disk that is full
        raise UserError(f"{path}: cannot be written ({reason(error)}); what was saved before is whole") from error


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote; UserError if it is damaged."""
    check_sums(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with damaged bytes can raise anything
        raise UserError(f"{path}: not a whole checkpoint ({reason(error)})") from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: not a checkpoint of this program")
    return state
