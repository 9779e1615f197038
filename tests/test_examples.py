"""The examples run as they stand, but for fewer steps."""

import json
import re
import runpy
from pathlib import Path

import pytest

from tests.hf_models import make_folder, open_hf

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def test_every_cell_of_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((EXAMPLES / "finetune.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in notebook["cells"]) and sum("STEPS = 300" in cell for cell in cells) == 1
    names: dict = {}
    for cell in cells:
        exec(cell.replace("STEPS = 300", "STEPS = 4").replace("data[:200], data[200:]", "data[:8], data[200:]"), names)
    assert len(names["losses"]) == 4 and names["losses"][-1] < names["losses"][0]
    assert (tmp_path / "out" / "notebook" / "tuned.pth").stat().st_size > 6_000_000
    assert capsys.readouterr().out.count("right: ") == 2


def test_the_llama_example_lowers_the_held_out_loss_and_writes_what_transformers_reads(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "llama")
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}."} for i in range(40)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    example = runpy.run_path(str(EXAMPLES / "llama.py"))
    example["main"]("llama", "mine.jsonl", "tuned", r=8, lr_init=3e-3, epoch_count=3)
    before, after = map(float, re.findall(r"(?:before|after): ([\d.]+)", capsys.readouterr().out))
    assert after < before - 0.1
    open_hf(tmp_path / "tuned")
