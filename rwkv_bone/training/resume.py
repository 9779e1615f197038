"""Step checkpoints: all that a run needs to go on as if it had never stopped, and no more.

    checkpoints/step-00000123.ckpt          the run: what trains, lengths of the logs, ...; and what is the first device's own
    checkpoints/step-00000123.rank-1.ckpt   what is the second's: random numbers, its part of a shared-out optimiser; and so on

Where in the data a run stands follows from the step. A file appears under its name when it is whole, and the first device's
comes last: a checkpoint that has it has all. It goes first when the checkpoint is dropped.
"""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import UserError
from ..files.atomic import atomic
from ..files.pth import check_sums, reason
from ..peft import adapter_tensors


def folder(proj_dir: str | Path) -> Path:
    return Path(proj_dir) / "checkpoints"


def path_of(proj_dir: str | Path, step: int, rank: int = 0) -> Path:
    return folder(proj_dir) / (f"step-{step:08d}.rank-{rank}.ckpt" if rank else f"step-{step:08d}.ckpt")


def steps_saved(proj_dir: str | Path) -> list[int]:
    """Steps of which there is a checkpoint, the newest first."""
    names = [re.fullmatch(r"step-(\d+)\.ckpt", path.name) for path in folder(proj_dir).glob("step-*.ckpt")]
    return sorted((int(name[1]) for name in names if name), reverse=True)


def newest(proj_dir: str | Path, rank: int = 0) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint that is whole on every device: the run's state and that of device `rank`. None if there is none.

    A damaged one is passed over with a warning. If all are damaged, that is an error.
    """
    steps = steps_saved(proj_dir)
    for step in steps:
        try:
            run = load_state(path_of(proj_dir, step))
            for other in range(1, run["geometry"]["devices"]):
                check_sums(path_of(proj_dir, step, other))
            has_own = 0 < rank < run["geometry"]["devices"]
            return run, load_state(path_of(proj_dir, step, rank)) if has_own else run["own"]
        except UserError as error:
            if rank == 0:
                print(f"warning: {error}; taking the checkpoint before", file=sys.stderr)
    if steps:
        where = folder(proj_dir)
        raise UserError(f"{where}: none of {len(steps)} checkpoints is whole; --overwrite without --resume begins anew")
    return None


def save(
    proj_dir: str | Path, step: int, run: dict[str, Any], own: dict[str, Any], rank: int, barrier: Callable[[], None],
    keep_last: int,
) -> None:  # fmt: skip
    """Write one checkpoint, each device its `own`, the first also `run`; then drop all but the newest `keep_last`."""
    if rank:
        save_state(path_of(proj_dir, step, rank), own)
    barrier()
    if rank == 0:
        save_state(path_of(proj_dir, step), {**run, "own": own})
        for old in steps_saved(proj_dir)[keep_last:]:
            for path in (path_of(proj_dir, old), *folder(proj_dir).glob(f"step-{old:08d}.rank-*.ckpt")):
                path.unlink(missing_ok=True)


def clear(proj_dir: str | Path, after: int = 0) -> None:
    """Remove checkpoints beyond step `after`, and what killed processes left half written."""
    whole = {step for step in steps_saved(proj_dir) if step <= after}
    for path in folder(proj_dir).glob("step-*"):
        if path.suffix != ".ckpt" or int(path.name[5:13]) not in whole:
            path.unlink()
    for path in Path(proj_dir).glob("*.tmp"):
        path.unlink()


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
    """Write what a run needs to go on (nested dicts and lists of tensors and plain values)."""
    with atomic(path) as file:
        torch.save(dict(state), file)


def load_state(path: str | Path) -> dict[str, Any]:
    """Read what `save_state` wrote; UserError if it is damaged."""
    check_sums(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler fed with damaged bytes can raise anything
        raise UserError(f"{path}: not a whole checkpoint ({reason(error)})") from None
