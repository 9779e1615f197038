"""Step checkpoints: all that a run needs to go on as if it had never stopped, and no more.

`proj_dir/checkpoints/step-00000123.ckpt` holds what trains, the optimiser, the random numbers of every device and the length of
the loss log. Where in the data a run stands follows from the step. Checkpoints appear under their name when they are whole.
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint import load_state, save_state
from ..errors import UserError
from ..peft import adapter_tensors


def folder(proj_dir: str | Path) -> Path:
    return Path(proj_dir) / "checkpoints"


def steps_saved(proj_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints, the newest first."""
    found = [(m, path) for path in folder(proj_dir).glob("step-*.ckpt") if (m := re.fullmatch(r"step-(\d+)\.ckpt", path.name))]
    return sorted(((int(m[1]), path) for m, path in found), reverse=True)


def newest_state(proj_dir: str | Path) -> dict[str, Any] | None:
    """The newest checkpoint that is whole; a damaged one is passed over with a warning. None if there is none."""
    for _, path in steps_saved(proj_dir):
        try:
            return load_state(path)
        except UserError as error:
            print(f"warning: {error}; taking the one before", file=sys.stderr)
    return None


def save_step(proj_dir: str | Path, state: dict[str, Any], keep_last: int) -> Path:
    """Write one checkpoint, then drop all but the newest `keep_last`."""
    path = folder(proj_dir) / f"step-{state['step']:08d}.ckpt"
    save_state(path, state)
    for _, old in steps_saved(proj_dir)[keep_last:]:
        old.unlink(missing_ok=True)
    return path


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
