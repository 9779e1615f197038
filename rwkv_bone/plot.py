"""A picture of one or more runs: loss, learning rate and tokens/s over the steps, from each run's loss_data.jsonl.

    python -m rwkv_bone.plot DIR... [--out loss.png]

The loss of each step is drawn faint, and over it the smoothed loss, as training/losses.py defines it: the mean per trained token
over the last twentieth of the steps so far, which is the number that a terminal shows. Circles are the held-out
loss. Speeds are smoothed likewise, over time,
without the first step, which builds kernels and warms up. Drawn with matplotlib, the optional extra `plot`.
"""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import Parser, UserError, run
from .files.atomic import atomic
from .training.losses import smoothed

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito: for all eyes
COLUMNS = ("step", "epoch", "loss", "lr", "t_cost", "kt_s", "trained")
LARGEST = 1e15  # a value beyond this is none of a run's
FORMATS = ("png", "svg", "pdf")
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888888",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.edgecolor": "none",
    "legend.framealpha": 0.85,
    "agg.path.chunksize": 20000,  # a million steps would be too long for one path
    "svg.hashsalt": "rwkv-bone",
}


def read_run(path: str | Path) -> dict[str, np.ndarray]:
    """The columns of a run's loss_data.jsonl, in order of steps; NaN where a line has no such value.

    path: the run's folder, or the file. RWKV-PEFT's files, which name no steps, are read as well. A step that is there twice
    counts as it was the last time; a last line that is being written is left out.
    """
    path = Path(path)
    file = path if path.suffix == ".jsonl" else path / "loss_data.jsonl"
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        what = "there is no loss_data.jsonl; is this a run's folder?" if path.is_dir() else error.strerror
        raise UserError(f"{path}: {what}") from None
    steps = {}
    for number, line in enumerate(lines[:-1], 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            values = [value_of(row.get(name)) for name in COLUMNS]
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise UserError(f'{file}, line {number}: wanted a line such as {{"step": 1, "loss": 2.5}}') from None
        if math.isnan(values[0]):
            values[0] = float(number)
        steps[values[0]] = values
    if not steps:
        raise UserError(f"{file}: no step is in it yet")
    return dict(zip(COLUMNS, np.array([steps[step] for step in sorted(steps)]).T))


def read_held_out(path: str | Path) -> np.ndarray:
    """(measures, 2): step and held-out loss, from the val_data.jsonl beside a run's loss_data.jsonl, if there is one."""
    path = Path(path)
    file = (path.parent if path.suffix == ".jsonl" else path) / "val_data.jsonl"
    found = []
    for line in file.read_bytes().split(b"\n")[:-1] if file.is_file() else []:
        try:
            row = json.loads(line)
            found.append([value_of(row["step"]), value_of(row["loss"])])
        except (ValueError, TypeError, KeyError, RecursionError):
            raise UserError(f'{file}: wanted lines such as {{"step": 1, "loss": 2.5}}') from None
    return np.array(found, float).reshape(-1, 2)


def value_of(value: Any) -> float:
    """A number of a file, or NaN for null and for what is too large to be drawn; TypeError for anything else."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError
    return float(value) if abs(value) <= LARGEST else math.nan  # NaN, too, is not within


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the runs in folders (or loss_data.jsonl files) `runs` into the picture `out`: .png, .svg or .pdf."""
    out = Path(out)
    if out.suffix.lower().lstrip(".") not in FORMATS:
        raise UserError(f"--out {out}: wanted a name that ends in .{', .'.join(FORMATS)}")
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import EngFormatter, MaxNLocator
    except ImportError:
        raise UserError("pictures are drawn with matplotlib; pip install matplotlib") from None
    data = {str(path): read_run(path) for path in runs}
    with_lr = any(np.isfinite(columns["lr"]).any() for columns in data.values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 7.5 if with_lr else 6), layout="constrained")
        heights = [3, 1, 1] if with_lr else [3, 1]
        panels = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
        loss_panel, speed_panel, lr_panel = panels[0], panels[-1], panels[1] if with_lr else None
        lines = []
        for number, (name, columns) in enumerate(data.items()):
            colour = COLOURS[number % len(COLOURS)]
            lines += draw_loss(loss_panel, name, columns, colour)
            draw_speed(speed_panel, columns, colour)
            if lr_panel is not None:
                lr_panel.plot(columns["step"], columns["lr"], color=colour, linewidth=1.5, **mark_of(columns))
        borders = epoch_borders(next(iter(data.values()))) if len(data) == 1 else []
        for panel in panels:
            panel.yaxis.set_label_coords(-0.075, 0.5)
            for border in borders:
                panel.axvline(border, color="#bbbbbb", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
        loss_panel.set_ylim(*loss_limits(data.values(), lines))
        loss_panel.set_ylabel("loss (nats per token)")
        loss_panel.legend(loc="upper right", title="loss at the end")
        if lr_panel is not None:
            lr_panel.set_ylabel("learning rate")
            lr_panel.set_ylim(bottom=0)
            lr_panel.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
        speeds = np.concatenate([1000 * columns["kt_s"] for columns in data.values()])
        speeds = speeds[np.isfinite(speeds)]
        speed_panel.set_ylabel("tokens/s")
        speed_panel.set_ylim(0, 1.15 * np.quantile(speeds, 0.98) if len(speeds) and speeds.max() > 0 else 1)
        speed_panel.yaxis.set_major_formatter(EngFormatter(sep=""))
        speed_panel.set_xlabel("step" + (" (dashed: epochs)" if borders else ""))
        speed_panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        speed_panel.margins(x=0.01)
        with atomic(out) as file:
            figure.savefig(file, format=out.suffix.lower()[1:], dpi=130)
    return out


def mark_of(columns: dict[str, np.ndarray]) -> dict[str, str]:
    """A dot for each step where there are few."""
    return {"marker": "."} if len(columns["step"]) < 20 else {}


def draw_loss(panel, name: str, columns: dict[str, np.ndarray], colour: str) -> list[np.ndarray]:
    """Each step's loss, faint, the smoothed and the held-out one; returns the last two."""
    step, loss = columns["step"], columns["loss"]
    weights = np.where(np.isfinite(columns["trained"]), columns["trained"], 1)
    lines = [smoothed(loss, weights)]
    last = lines[0][np.isfinite(lines[0])][-1:]
    label = f"{name}: " + (f"{last[0]:.4f}" if len(last) else "no finite loss")
    mark = mark_of(columns)
    if not mark:
        panel.plot(step, loss, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(step, lines[0], color=colour, linewidth=1.8, label=label, **mark)
    held_out = read_held_out(name)
    if len(held_out):
        lines.append(held_out[:, 1])
        label = f"{name}, held out: {held_out[-1, 1]:.4f}"
        ring = {"marker": "o", "markersize": 5, "markerfacecolor": "white", "linestyle": ":", "linewidth": 1.2}
        panel.plot(*held_out.T, color=colour, label=label, **ring)
    bad = ~np.isfinite(loss) & (weights > 0)  # a step without a trained token has none, and rightly so
    if bad.any():
        place = panel.get_xaxis_transform()  # at the bottom, whatever the losses are
        text = f"{name}: {bad.sum()} steps without a finite loss"
        panel.plot(step[bad], np.full(bad.sum(), 0.02), "x", color="#c00000", transform=place, label=text)
    return lines


def draw_speed(panel, columns: dict[str, np.ndarray], colour: str) -> None:
    step, speed, mark = columns["step"], 1000 * columns["kt_s"], mark_of(columns)
    if not mark:
        panel.plot(step, speed, color=colour, alpha=0.25, linewidth=0.8)
    seconds = np.where(np.isfinite(columns["t_cost"]), columns["t_cost"], 1)  # so the mean is tokens / time
    seconds[0] = 0 if len(seconds) > 1 else 1  # the first step builds and warms up
    panel.plot(step, smoothed(speed, seconds), color=colour, linewidth=1.5, **mark)


def epoch_borders(columns: dict[str, np.ndarray]) -> list[float]:
    """Where one epoch ends and the next begins, unless that is too often to draw."""
    step, epoch = columns["step"], columns["epoch"]
    at = np.flatnonzero(np.diff(epoch) > 0)  # NaN, where there are no epochs, is not greater
    return [float(step[i] + step[i + 1]) / 2 for i in at] if len(at) <= 30 else []


def loss_limits(data, smoothed) -> tuple[float, float]:
    """A range of the loss axis that shows every smoothed line and all raw losses but the wildest."""
    raw = np.concatenate([columns["loss"] for columns in data])
    raw, lines = raw[np.isfinite(raw)], np.concatenate(list(smoothed))
    lines = lines[np.isfinite(lines)]
    if not len(lines):
        return 0.0, 1.0
    low, high = min(np.quantile(raw, 0.005), lines.min()), max(np.quantile(raw, 0.995), lines.max())
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="rwkv_bone.plot", description="Draw loss, learning rate and tokens/s of runs.", allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folder of a run (its --proj_dir), or a loss_data.jsonl")
    text = "picture to write: .png, .svg or .pdf (default: loss.png, in the folder if there is only one)"
    parser.add_argument("--out", default="", metavar="FILE", help=text)
    args = parser.parse_args(argv)
    alone = len(args.runs) == 1 and os.path.isdir(args.runs[0])
    print(plot_runs(args.runs, args.out or (Path(args.runs[0]) / "loss.png" if alone else "loss.png")))


if __name__ == "__main__":
    run(main)
