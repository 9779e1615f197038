"""Pictures of runs: what is read, and what is to be seen."""

import json
import math
import random
import sys

import numpy as np
import pytest

from rwkv_bone.errors import UserError, run
from rwkv_bone.plot import COLOURS, epoch_borders, loss_limits, main, plot_runs, read_run
from rwkv_bone.training.losses import RunningLoss


def line(step: int, loss: float = 2.0, **more) -> dict:
    row = {"step": step, "epoch": 0, "loss": loss, "lr": 1e-4, "t_cost": 0.5, "kt_s": 2.0, "tokens": 1000, "trained": 800}
    return {**row, **more}


@pytest.fixture
def make_run(tmp_path):
    def make(name: str, rows) -> str:
        (tmp_path / name).mkdir()
        (tmp_path / name / "loss_data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    return make


def test_a_run_is_read_in_order_of_its_steps_each_as_it_was_last(make_run):
    columns = read_run(make_run("a", [line(1, 3.0), line(2, 2.0), line(3, 9.0), line(2, 2.5), line(3, 1.5)]))
    assert columns["step"].tolist() == [1, 2, 3]
    assert columns["loss"].tolist() == [3.0, 2.5, 1.5]
    assert columns["trained"].tolist() == [800] * 3


def test_a_line_that_is_being_written_is_left_out(make_run, tmp_path):
    path = make_run("a", [line(1), line(2)])
    with open(tmp_path / "a" / "loss_data.jsonl", "a") as file:
        file.write('{"step": 3, "lo')
    assert read_run(path)["step"].tolist() == [1, 2]
    assert read_run(tmp_path / "a" / "loss_data.jsonl")["step"].tolist() == [1, 2]


def test_rwkv_pefts_lines_are_numbered(make_run):
    columns = read_run(make_run("a", [{"loss": 2.0, "t_cost": 0.5, "kt_s": 1.0}, {"loss": math.nan, "t_cost": 0.5, "kt_s": 1.0}]))
    assert columns["step"].tolist() == [1, 2]
    assert np.isnan(columns["lr"]).all() and np.isnan(columns["loss"]).tolist() == [False, True]


def test_the_loss_axis_shows_every_smoothed_line_and_not_one_wild_step():
    raw = np.linspace(3, 2, 1000)
    raw[500] = 1e6
    low, high = loss_limits([{"loss": raw}], [np.linspace(3.2, 2, 10)])
    assert 1.8 < low < 2 and 3.2 < high < 3.4
    assert loss_limits([{"loss": np.array([math.nan])}], [np.array([math.nan])]) == (0, 1)
    low, high = loss_limits([{"loss": np.array([2.0])}], [np.array([2.0])])
    assert low < 2 < high


def test_epochs_are_marked_where_they_meet():
    assert epoch_borders({"step": np.arange(1.0, 10), "epoch": np.arange(9) // 3}) == [3.5, 6.5]
    assert epoch_borders({"step": np.arange(1.0, 101), "epoch": np.arange(100)}) == []
    assert epoch_borders({"step": np.arange(1.0, 4), "epoch": np.full(3, math.nan)}) == []


def test_each_run_is_drawn_in_its_colour_in_every_panel(make_run, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    first = [line(i, 2 + 1 / i) for i in range(1, 60)]
    second = [line(i, 3 + 1 / i, lr=2e-4, kt_s=4.0) for i in range(1, 60)]
    runs = [make_run("a", first), make_run("b", second)]
    pixels = image.imread(plot_runs(runs, tmp_path / "both.png"))[..., :3]
    assert pixels.shape[0] > 600 and pixels.shape[1] > 900
    panels = np.array_split(pixels, [int(0.54 * len(pixels)), int(0.75 * len(pixels))])
    for colour in COLOURS[:2]:
        rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        for panel in panels:
            assert (np.abs(panel - rgb).max(-1) < 0.02).sum() > 200, colour
    # a loss that falls is drawn falling: the line's first point is above its last
    top = panels[0]
    rows, columns = np.nonzero(np.abs(top - np.array([0, 0x72, 0xB2]) / 255).max(-1) < 0.02)
    plot_area = columns < 0.7 * top.shape[1]  # left of the legend
    assert rows[plot_area][columns[plot_area].argmin()] < rows[plot_area][columns[plot_area].argmax()]


def test_labels_say_what_and_in_which_units(make_run, tmp_path):
    pytest.importorskip("matplotlib")
    path = make_run("a", [line(i, math.nan if i in (3, 4) else 2.5, epoch=i // 10) for i in range(1, 31)])
    text = plot_runs([path], tmp_path / "a.svg").read_text()
    for label in ("loss (nats per token)", "learning rate", "tokens/s", "step (dashed: epochs)", f"{path}: 2.5000"):
        assert f"<!-- {label} -->" in text
    assert f"{path}: 2 steps without a finite loss" in text


def test_a_step_that_trained_no_token_is_no_fault(make_run, tmp_path):
    pytest.importorskip("matplotlib")
    path = make_run("a", [line(i, None, trained=0) if i == 3 else line(i, 2.5) for i in range(1, 31)])
    text = plot_runs([path], tmp_path / "a.svg").read_text()
    assert f"<!-- {path}: 2.5000 -->" in text and "without a finite loss" not in text


@pytest.mark.parametrize(
    "rows",
    [[line(1)], [line(1, math.nan)], [{"loss": 2.0}] * 3, [line(i, kt_s=0) for i in (1, 2)], [line(i) for i in range(1, 30001)]],
    ids=["one step", "no finite loss", "only losses", "no speed", "many steps"],
)
def test_odd_runs_are_drawn_too(make_run, tmp_path, rows):
    pytest.importorskip("matplotlib")
    assert plot_runs([make_run("a", rows)], tmp_path / "a.png").stat().st_size > 5000


def test_the_picture_lies_in_the_runs_folder_or_where_told(make_run, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    a, b = make_run("a", [line(1), line(2)]), make_run("b", [line(1)])
    main([a])
    main([a, b])
    main([a, "--out", "c.pdf"])
    assert capsys.readouterr().out.split() == [f"{a}/loss.png", "loss.png", "c.pdf"]
    assert (tmp_path / "a" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "c.pdf").read_bytes()[:4] == b"%PDF"


def test_without_matplotlib_one_line_says_how_to_get_it(make_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install matplotlib"):
        plot_runs([make_run("a", [line(1)])], tmp_path / "a.png")


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("", [], "no step is in it yet"),
        ('{"step": 1, "loss": 2}\n{"step": 2 "loss": 2}\n', [], "line 2: wanted a line such as"),
        ("[1]\n", [], "line 1: wanted"),
        ('{"step": 1, "loss": "two"}\n', [], "line 1: wanted"),
        (None, [], "no loss_data.jsonl; is this a run's folder?"),
        ('{"step": 1, "loss": 2}\n', ["--out", "a.bmp"], "ends in .png, .svg, .pdf"),
        ('{"step": 1, "loss": 2}\n', ["--out", "/proc/none/a.png"], "cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, content, arguments, message):
    pytest.importorskip("matplotlib")
    if content is not None:
        (tmp_path / "loss_data.jsonl").write_text(content)
    with pytest.raises(SystemExit) as end:
        run(lambda: main([str(tmp_path), *arguments]))
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


ODD = ("null", "true", '"x"', "[1]", "{}", "-1", "0", "1e308", "-1e308", "1e-320", "1" + "0" * 400, "1" * 5000, "NaN",
       "-Infinity", "[" * 5000 + "]" * 5000, '"\\ud800"', "", "1.5.2")  # fmt: skip


def test_whatever_a_file_holds_it_is_drawn_or_refused_in_a_line(tmp_path):
    pytest.importorskip("matplotlib")
    choose = random.Random(0)
    drawn = 0
    for case in range(120):
        rows = [{name: json.dumps(value) for name, value in line(step).items()} for step in range(1, 25)]
        for _ in range(choose.randint(1, 3)):
            row = choose.choice(rows)
            row[choose.choice(list(row))] = choose.choice(ODD)
            if choose.random() < 0.2:
                row.pop(choose.choice(list(row)))
        text = "".join("{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}\n" for row in rows)
        if choose.random() < 0.2:
            text = choose.choice([text[choose.randint(0, len(text)) :], text.replace("}", "", 1), choose.choice(ODD) + "\n"])
        (tmp_path / "loss_data.jsonl").write_text(text)
        try:
            columns = read_run(tmp_path)
            if case % 10 == 0 or not np.isfinite(columns["step"]).all():
                plot_runs([tmp_path], tmp_path / "a.svg")
            drawn += 1
        except UserError as error:
            assert "\n" not in str(error)
    assert 20 < drawn < 100
    values = ["1e15", "-1e15", "1e-320", "0", "null"]
    rows = [{name: choose.choice(values) if name != "step" else str(10 ** (step % 16)) for name in line(1)} for step in range(40)]
    text = "".join("{" + ", ".join(f'"{name}": {value}' for name, value in row.items()) + "}\n" for row in rows)
    (tmp_path / "loss_data.jsonl").write_text(text)
    plot_runs([tmp_path], tmp_path / "a.svg")


def test_the_line_ends_at_the_smoothed_loss_that_a_terminal_shows(make_run, tmp_path):
    pytest.importorskip("matplotlib")
    rows = [line(step, 2 + 1 / step, trained=step % 7 + 1) for step in range(1, 101)]
    running = RunningLoss((row["loss"], row["trained"]) for row in rows)
    path = make_run("a", rows)
    assert f"<!-- {path}: {running.value:.4f} -->" in plot_runs([path], tmp_path / "a.svg").read_text()


def test_a_run_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none: No such file"):
        read_run(tmp_path / "none")
