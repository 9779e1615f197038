"""The examples run as they stand, but for fewer steps."""

import json
from pathlib import Path

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
