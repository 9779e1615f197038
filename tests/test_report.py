"""report.html opens in a browser: it shows the curves, the answers and the commands, and its script makes no error."""

import math
import re
import shutil
import subprocess

import numpy as np
import pytest

from rwkv_bone.config import TrainConfig
from rwkv_bone.training.ending import Course
from rwkv_bone.training.report import render, ticks
from rwkv_bone.training.samples import Sample
from rwkv_bone.training.verdict import Held

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
ODD = "</script><b>a & b</b>"


def course(steps: int = 60) -> Course:
    lines = [
        {"step": n, "epoch": n // 30, "loss": 2 + 3 / n if n != 7 else None, "lr": 1e-3, "trained": 80 * (n != 7), "tokens": 100,
         "t_cost": 0.5}
        for n in range(1, steps + 1)
    ]  # fmt: skip
    held_out = [Held(0, 0, 5.0), Held(30, 0, 3.0), Held(60, 1, 2.5)]
    answers = [Sample(0, f"Why? {ODD}", "nonsense"), Sample(60, f"Why? {ODD}", "because")]
    return Course(lines, 5.0, 2.05, held_out, answers)


@pytest.fixture(scope="module")
def page() -> str:
    config = TrainConfig(data_file="mine.jsonl", load_model="base.pth", lr_init=1e-3, ctx_len=77)
    return render("bone on base.pth", config, course(), f"data  {ODD}", "overfitted from epoch 1 on", ["rwkv-bone merge x"])


def browse(page: str, folder, *flags: str) -> tuple[str, str]:
    """The page as the browser has it after its scripts, and what the browser logged of them."""
    (folder / "page.html").write_text(page)
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr")
    command = [BROWSER, *quiet, f"--user-data-dir={folder}/profile"]
    done = subprocess.run(
        [*command, *flags, f"file://{folder}/page.html"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture
def browser():
    if not BROWSER:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")


def test_the_page_needs_nothing_beside_it_and_no_text_of_the_run_becomes_markup(page):
    assert not re.search(r"https?://|<link|<img|src=", page)
    assert ODD not in page and page.count("</script>") == 2
    for text in ("overfitted from epoch 1 on", "because", "rwkv-bone merge x", "ctx_len", "77", "held out"):
        assert text in page


def test_the_curve_is_seen_and_the_script_shows_the_value_under_the_pointer(page, browser, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    point = "<script>svg.dispatchEvent(new PointerEvent('pointermove', {clientX: svg.getBoundingClientRect().right}))</script>"
    shot = tmp_path / "page.png"
    dom, errors = browse(page.replace("</body>", point + "</body>"), tmp_path, "--dump-dom")
    assert not errors
    assert f"step 60: loss {2 + np.mean([3 / n for n in (58, 59, 60)]):.4f} (smoothed)" in dom
    _, errors = browse(page, tmp_path, f"--screenshot={shot}", "--window-size=1000,1400")
    assert not errors
    pixels = image.imread(shot)[..., :3]
    for colour, least in (((0x00, 0x72, 0xB2), 800), ((0xD5, 0x5E, 0x00), 300)):
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.1).sum() > least


def test_held_out_losses_lie_within_the_picture_from_before_the_first_step_on(page):
    places = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="(\S+)" cy="(\S+)"', page)]
    assert len(places) == 3 and all(64 <= x <= 890 and 22 <= y <= 286 for x, y in places)


def test_a_script_that_fails_would_be_noticed(page, browser, tmp_path):
    _, errors = browse(page.replace("</body>", "<script>nothing.at.all()</script></body>"), tmp_path, "--dump-dom")
    assert "ReferenceError" in errors


@pytest.mark.parametrize("steps", [1, 2, 5000])
def test_any_length_is_drawn_within_the_picture(steps):
    text = render("t", TrainConfig(data_file="x"), course(steps)._replace(held_out=[], samples=[]), "", "", [])
    paths = " ".join(re.findall(r' d="(M[^"]*)" fill', text))
    places = [tuple(map(float, place)) for place in re.findall(r"[ML]([\d.]+) ([\d.]+)", paths)]
    assert all(0 <= x <= 900 and 0 <= y <= 320 for x, y in places) and "nan" not in text and len(text) < 150_000
    assert bool(places) == (steps > 1)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.05, 2.06), (-3, 5000), (1e-6, 3e-6), (1, 2)])
def test_ticks_are_round_and_within(low, high):
    found = ticks(low, high)
    assert 2 <= len(found) <= 6 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9
    assert all(math.isclose(value, float(f"{value:.4g}"), abs_tol=1e-12) for value in found)
