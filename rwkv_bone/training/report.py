"""report.html: a run in one file that any browser opens and that needs nothing beside it.

It holds the curves, the answers before and after, data, settings, and the next commands. The curves are SVG, written here; a
script of a few lines shows the values under the pointer, and the page is whole without it.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from ..config import TrainConfig
from ..files.atomic import atomic
from . import samples
from .ending import Course, facts
from .losses import smoothed
from .outputs import RunFolder

FILE = "report.html"
POINTS = 800  # of a curve at the most
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 900, 320, 64, 34, 22  # of a picture, in its own units

STYLE = """
:root { color-scheme: light dark; --line: #0072b2; --held: #d55e00; --faint: #8886; --text: #222; --back: #fff; --box: #f3f4f6 }
@media (prefers-color-scheme: dark) { :root { --line: #56b4e9; --held: #e69f00; --text: #ddd; --back: #181818; --box: #262626 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); max-width: 960px; margin: 2em auto;
  padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin: 1.8em 0 .5em }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; vertical-align: top; padding: .3em .6em;
  border-bottom: 1px solid var(--faint) } td { white-space: pre-wrap; overflow-wrap: anywhere }
pre { background: var(--box); padding: .8em; overflow-x: auto; font-size: 13px } svg { width: 100%; height: auto }
.warn { border-left: 4px solid var(--held); padding: .4em .8em; background: var(--box) }
text { fill: var(--text); font-size: 12px } #readout { min-height: 1.5em }
"""

SCRIPT = """
const curve = JSON.parse(document.getElementById("curve").textContent);
const svg = document.getElementById("loss"), mark = document.getElementById("mark"), readout = document.getElementById("readout");
svg.addEventListener("pointermove", event => {
  const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * curve.width;
  let n = 0;
  curve.x.forEach((at, i) => { if (Math.abs(at - x) < Math.abs(curve.x[n] - x)) n = i; });
  mark.setAttribute("d", `M${curve.x[n]} 0V${curve.height}`);
  readout.textContent = `step ${curve.step[n]}: loss ${curve.loss[n] ?? "none"} (smoothed)`;
});
"""


def write(folder: RunFolder, config: TrainConfig, course: Course, before: str, off: str, commands: Sequence[str]) -> None:
    """before: what was said before the first step; off: the verdict, "" where nothing is; commands: what to type next."""
    folder.claim(FILE)
    page = render(f"{config.peft} on {config.load_model or 'a new model'}", config, course, before, off, commands)
    with atomic(folder / FILE) as file:
        file.write(page.encode())


def render(title: str, config: TrainConfig, course: Course, before: str, off: str, commands: Sequence[str]) -> str:
    """The page."""
    names = ("step", "loss", "trained", "lr")
    step, loss, trained, lr = (np.array([line[name] for line in course.steps], float) for name in names)
    line = smoothed(loss, trained)
    held_out = np.array([(h.step, h.loss) for h in course.held_out], float).reshape(-1, 2)
    some = np.unique(np.linspace(0, len(step) - 1, min(len(step), POINTS)).astype(int))
    picture = Picture(np.append(step, held_out[:, 0]), np.concatenate([line, loss, held_out[:, 1]]))
    curve = {
        "width": WIDTH,
        "height": HEIGHT - BOTTOM,
        "x": [round(picture.x(s), 1) for s in step[some]],
        "step": step[some].astype(int).tolist(),
        "loss": [round(v, 4) if math.isfinite(v) else None for v in line[some].tolist()],
    }
    loss_svg = picture.svg("loss", "loss (nats per token)", [
        picture.path(step[some], loss[some], "var(--faint)", 1),
        picture.path(step[some], line[some], "var(--line)", 2),
        picture.path(held_out[:, 0], held_out[:, 1], "var(--held)", 2, dots=True),
        '<path id="mark" d="" stroke="var(--faint)"/>',
    ])  # fmt: skip
    rate = Picture(step, np.append(lr, 0), height=140)
    rate_svg = rate.svg("rate", "learning rate", [rate.path(step[some], lr[some], "var(--line)", 2)])
    legend = "<b style='color:var(--line)'>smoothed</b>, <span style='opacity:.6'>each step</span>"
    legend += ", <b style='color:var(--held)'>held out</b>" if len(held_out) else ""
    return "\n".join([
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f'<p class="warn">{escape(off)}</p>' if off else "",
        table(facts(course)),
        f"<h2>Loss</h2><p>{legend}</p>{loss_svg}<p id='readout'></p>{rate_svg}",
        answers(course),
        "<h2>Next</h2><pre>" + escape("\n".join(commands)) + "</pre>" if commands else "",
        f"<h2>Data and model</h2><pre>{escape(before)}</pre>",
        f"<h2>Settings</h2>{table(settings(config))}",
        f'<script type="application/json" id="curve">{json.dumps(curve)}</script><script>{SCRIPT}</script>',
        "</body></html>",
    ])  # fmt: skip


def settings(config: TrainConfig) -> list[tuple[str, Any]]:
    """What differs from the defaults."""
    usual = json.loads(TrainConfig(data_file="-").to_json())
    given = json.loads(config.to_json())
    return [(name, value) for name, value in given.items() if value != usual[name] and name != "notes"]


def table(rows: Sequence[tuple[str, Any]]) -> str:
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def answers(course: Course) -> str:
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>"
        for row in samples.first_and_last(course.samples)
    )
    head = "<tr><th>asked</th><th>before</th><th>after</th></tr>"
    return f"<h2>Answers before and after</h2><table>{head}{rows}</table>" if rows else ""


class Picture:
    """A chart: what of x and y it shows, and how values become places in it. x: (n,); y: (m,), NaN left out."""

    def __init__(self, x: np.ndarray, y: np.ndarray, height: int = HEIGHT):
        y = y[np.isfinite(y)]
        self.height = height
        self.x_range = (float(x.min()), float(x.max()) if x.max() > x.min() else float(x.min()) + 1)
        low, high = (float(np.quantile(y, 0.005)), float(np.quantile(y, 0.995))) if len(y) else (0.0, 1.0)
        margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
        self.y_range = (low - margin if low else 0.0, high + margin)

    def x(self, value: float) -> float:
        low, high = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - 10)

    def y(self, value: float) -> float:
        low, high = self.y_range
        share = min(max((value - low) / (high - low), 0), 1)  # what is beyond is drawn at the border
        return self.height - BOTTOM - share * (self.height - BOTTOM - TOP)

    def path(self, xs, ys, colour: str, width: float, dots: bool = False) -> str:
        points = [(self.x(x), self.y(y)) for x, y in zip(xs, ys) if math.isfinite(y)]
        line = " ".join(f"{'L' if n else 'M'}{x:.1f} {y:.1f}" for n, (x, y) in enumerate(points))
        marks = "".join(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>' for x, y in points) if dots else ""
        if len(points) == 1 and not dots:
            return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colour}"/>'
        return f'<path d="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>{marks}' if points else ""

    def svg(self, name: str, label: str, parts: Sequence[str]) -> str:
        axes = []
        for value in ticks(*self.y_range):
            y = self.y(value)
            axes.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - 10}" stroke="var(--faint)" stroke-width=".5"/>'
                        f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')  # fmt: skip
        for value in ticks(*self.x_range):
            axes.append(f'<text x="{self.x(value):.1f}" y="{self.height - 14}" text-anchor="middle">{value:g}</text>')
        axes.append(f'<text x="{LEFT}" y="12">{escape(label)}</text>')
        axes.append(f'<text x="{WIDTH - 10}" y="{self.height - 2}" text-anchor="end">step</text>')
        title = f'role="img" aria-label="{escape(label)} over the steps"'
        return f'<svg id="{name}" viewBox="0 0 {WIDTH} {self.height}" {title}>{"".join([*axes, *parts])}</svg>'


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers from low to high."""
    size = 10.0 ** math.floor(math.log10((high - low) / about))
    each = next(size * n for n in (1, 2, 5, 10) if (high - low) / (size * n) <= about)
    first = math.ceil(low / each - 1e-9)
    return [round(n * each, 12) for n in range(first, math.floor(high / each + 1e-9) + 1)]
