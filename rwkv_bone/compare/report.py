"""What a comparison found, as files: table.md, table.csv, runs.csv, curves.csv and curves.png. See command.py.

The picture's curves are differences: a step's loss less that of the untrained model, or of the reference method, on the same
batch. As each batch is new when it is met (in the first epoch), and as the methods meet the same ones, this is how fast each
learns, without the noise of which batch is easy.
"""

import csv
import importlib.util
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..training.losses import mean_loss

Row = dict[str, Any]
NAMES = {"base": "base, untrained", "none": "none: all parameters", "state": "state: initial states"}
EARLY = slice(7, 12)  # steps 8 to 12: how far a method is after some ten steps


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; nan for the deviation of one value."""
    if not values:
        return math.nan, math.nan
    finite = all(map(math.isfinite, values))
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 and finite else math.nan


def rows(study, rate: float | None = None) -> list[Row]:
    """A row for each entry that has a result at its best rate, or at `rate`, by held-out loss."""
    entries = (study.base, *study.entries)
    best = {entry.label: study.at(entry, rate) for entry in entries}
    untrained = [r["general_loss"] for r in best["base"] if r.get("general_loss") is not None]
    first = {record["seed"]: record["held_out_loss"] for record in best[study.reference]}
    found = []
    for entry in entries:
        records = best[entry.label]
        if not records:
            continue
        loss, spread = mean_and_spread([r["held_out_loss"] for r in records])
        # seed by seed: the same seed is the same order of the data
        apart, apart_spread = mean_and_spread([r["held_out_loss"] - first[r["seed"]] for r in records if r["seed"] in first])
        steps = [r for r in records if r["losses"]]
        general = [r["general_loss"] - untrained[0] for r in records if untrained and r.get("general_loss") is not None]
        found.append(
            {
                "method": entry.label,
                "r": dict(entry.options).get("r", ""),
                "trained": entry.trained,
                "lr": records[0]["lr"],
                "seeds": len(records),
                "held_out_loss": loss,
                "held_out_sd": spread,
                "difference": apart,
                "difference_sd": apart_spread,
                "early_loss": mean_and_spread([mean_loss(r["losses"][EARLY], step_tokens(r)[EARLY]) for r in steps])[0],
                "training_loss": mean_and_spread([mean_loss(r["losses"], step_tokens(r)) for r in steps])[0],
                "forgetting": mean_and_spread(general)[0],
                "forgetting_sd": mean_and_spread(general)[1],
                "step_seconds": min((r["step_seconds"] for r in records), default=0.0),
                "step_cpu_seconds": min(r["step_cpu_seconds"] for r in records),
                "peak_bytes": statistics.median(r["peak_bytes"] for r in records),
            }
        )
    return sorted(found, key=lambda row: row["held_out_loss"])


def step_tokens(record: Row) -> list[int]:
    """The trained tokens of each step; records of earlier versions do not say them, and count all steps alike."""
    return record.get("step_tokens") or [1] * len(record["losses"])


def signed(value: float, spread: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:+.4f}" + (f" ± {spread:.4f}" if math.isfinite(spread) else "")


def markdown(table: Iterable[Row], reference: str, on_cpu: bool) -> str:
    """The table for people. Spreads are standard deviations over seeds."""
    time = "CPU ms a step" if on_cpu else "ms a step"
    head = ["method", "r", "trained", "lr", "held-out loss", f"less {reference}'s", "steps 8-12", "all steps", "forgetting",
            time, "peak MiB"]  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row in table:
        base = row["method"] == "base"
        loss = f"{row['held_out_loss']:.4f}"
        if not base and math.isfinite(row["held_out_sd"]):
            loss += f" ± {row['held_out_sd']:.4f}"
        seconds = row["step_cpu_seconds" if on_cpu else "step_seconds"]
        own = row["method"] == reference
        cells = [
            NAMES.get(row["method"], row["method"]),
            row["r"],
            "" if base else f"{row['trained']:,}",
            "" if base else f"{row['lr']:g}",
            loss,
            "" if own else signed(row["difference"], row["difference_sd"]),
            f"{row['early_loss']:.4f}",
            f"{row['training_loss']:.4f}",
            "" if base else signed(row["forgetting"], row["forgetting_sd"]),
            "" if base else f"{1000 * seconds:.0f}",
            "" if base else f"{row['peak_bytes'] / 2**20:.0f}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def write(study) -> None:
    """All files, of the runs that are done."""
    out, results, table = study.out, study.results(), rows(study)
    if not table:
        print("nothing is done yet")
        return
    on_cpu = all(record["device"] == "cpu" for record in results.values())
    text = markdown(table, study.reference, on_cpu)
    if rate := study.comparison.one_rate:
        text += f"\nAll at the rate {rate:g}:\n\n" + markdown(rows(study, rate), study.reference, on_cpu)
    (out / "table.md").write_text(text)
    write_csv(out / "table.csv", table)
    one = ("lr", "seed", "choosing_loss", "held_out_loss", "step_seconds", "step_cpu_seconds", "peak_bytes", "seconds", "date")
    records = sorted(results.values(), key=lambda r: (r["label"], r["lr"], r["seed"]))
    runs = [{"method": r["label"], "r": r["options"].get("r", ""), **{name: r[name] for name in one}} for r in records]
    write_csv(out / "runs.csv", runs)
    curves = [
        {"method": r["label"], "lr": r["lr"], "seed": r["seed"], "step": step, "loss": f"{loss:.6f}"}
        for r in records
        for step, loss in enumerate(r["losses"], 1)
    ]
    write_csv(out / "curves.csv", curves)
    print("\n" + text)
    if importlib.util.find_spec("matplotlib"):
        picture(study, table, out / "curves.png")
        print(f"{out}: table.md, table.csv, runs.csv, curves.csv, curves.png")
    else:
        print(f"{out}: table.md, table.csv, runs.csv, curves.csv; for a picture: pip install 'rwkv-bone[plot]', then --report")


def write_csv(path: Path, table: list[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0].keys() if table else [])
        writer.writeheader()
        writer.writerows(table)


# -------------------------------------------------- the picture

OTHERS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#8c564b", "#7f7f7f", "#17becf", "#bcbd22", "#9467bd", "#1f4e79")


def apart(records: Iterable[Row], others: Iterable[Row]) -> list[float]:
    """Step by step: loss less that of the other record of the same seed, so on the same batch; the mean over seeds."""
    of_seed = {record["seed"]: record["losses"] for record in others}
    pairs = [(r["losses"], of_seed[r["seed"]]) for r in records if r["seed"] in of_seed]
    per_seed = [[ours - theirs for ours, theirs in zip(*pair)] for pair in pairs]
    return [statistics.fmean(step) for step in zip(*per_seed)]


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values, or as many as there are."""
    return [statistics.fmean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))]


def picture(study, table: Sequence[Row], path: Path) -> None:
    """Four panels: the loss step by step against the untrained model and the reference, the sweep, the result of every seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    entries = {entry.label: entry for entry in study.entries}
    labels = [row["method"] for row in table if row["method"] in entries]
    colours = dict(zip((name for name in entries if name not in (study.reference, "none")), OTHERS * 9))
    colours |= {study.reference: "#d62728", "none": "black"}
    widths = {label: 2.6 if label == study.reference else 1.4 for label in labels}
    front = {label: 5 if label == study.reference else 3 for label in labels}
    best = {label: study.at(entries[label]) for label in labels}
    results, base, reference = study.results(), study.at(study.base), study.at(entries[study.reference])
    figure, ((over, under), (middle, right)) = plt.subplots(2, 2, figsize=(13, 10.2), layout="constrained")

    width = max(1, study.comparison.steps // 8)
    panels = ((over, base, "the untrained model's"), (under, reference, f"{study.reference}'s"))
    for panel, others, of in panels:
        for label in labels:
            curve = smooth(apart(best[label], others), width)
            panel.plot(range(1, len(curve) + 1), curve, color=colours[label], lw=widths[label], zorder=front[label], label=label)
        panel.axhline(0, color="grey", lw=0.8, ls=":")
        panel.set(xlabel="step", ylabel="nats a token", title=f"Training loss less {of} on the same batch\n"
                  f"each at its best rate, mean over seeds and the last {width} steps")  # fmt: skip
    order = "in the order of held-out loss"
    figure.legend(*over.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, title=order)

    seen = []
    for label in labels:
        tried = sorted((run.lr, record["choosing_loss"]) for run, record in results.items()
                       if run.entry.label == label and run.seed == study.comparison.seeds[0])  # fmt: skip
        tried = [(lr, loss) for lr, loss in tried if math.isfinite(loss)]
        seen += [loss for _, loss in tried]
        rates = [lr for lr, _ in tried]
        middle.plot(rates, [loss for _, loss in tried], "o-", ms=4, color=colours[label], lw=widths[label], zorder=front[label])
    untrained = max((record["choosing_loss"] for record in base), default=math.inf)
    low, high = min(seen, default=0.0), min(max(seen, default=0.0), untrained)  # what is worse than no training needs no room
    if low < high:
        middle.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    middle.set(xscale="log", xlabel="learning rate", ylabel="nats a token",
               title="Sweep of the rate with the first seed:\nloss on the half of the held-out text that chooses")  # fmt: skip

    for place, label in enumerate(labels):
        losses = [record["held_out_loss"] for record in best[label]]
        right.plot(losses, [place] * len(losses), "o", ms=6, alpha=0.6, color=colours[label], zorder=3)
        right.plot([mean_and_spread(losses)[0]], [place], "|", ms=18, mew=2, color=colours[label], zorder=4)
    right.set_yticks(range(len(labels)), labels)
    for tick, label in zip(right.get_yticklabels(), labels):
        tick.set_color(colours[label])
        tick.set_fontweight("bold" if label == study.reference else "normal")
    right.invert_yaxis()
    right.locator_params(axis="x", nbins=6)
    right.grid(axis="x", color="#dddddd", lw=0.6)
    right.set(xlabel="nats a token", title="Held-out loss on the other half\na dot a seed, a stroke their mean")
    figure.savefig(path, dpi=130)
    plt.close(figure)
