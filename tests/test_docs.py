"""What README and docs say is run: every command, and the example of a method of one's own."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model

from rwkv_bone.checkpoint import save_tensors
from rwkv_bone.peft import METHODS, inject, merge

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def run_lines(block: str, folder: Path) -> int:
    """Run a block of commands as they stand, but for this environment's python and programs; how many there were."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = [line for line in block.splitlines() if not line.startswith("pip install")]  # which makes an environment like this
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "python", line
        if words[1] in ("train.py", "merge.py"):
            words[1] = str(ROOT / words[1])
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, line + result.stdout + result.stderr
    return len(lines)


@pytest.mark.slow
def test_the_readmes_own_run_works_line_by_line(tmp_path):
    model = small_model(dtype=torch.float32, vocab_size=257, n_embd=64, dim_att=64, dim_ffn=64)
    save_tensors(tmp_path / "base.pth", {name: t.bfloat16() for name, t in model.state_dict().items()})
    rows = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own,) = [block for block in blocks(README, "sh") if "train.py" in block]
    assert run_lines(own, tmp_path) == 4
    assert (tmp_path / "tuned.pth").exists()


@pytest.mark.slow
def test_the_commands_of_the_run_on_real_data_work(data, tmp_path):
    shutil.copy(data / "tiny-rwkv6-1m.pth", tmp_path)
    (tmp_path / "gsm8k").mkdir()
    for name in ("train", "test"):
        lines = (data / "gsm8k" / f"{name}.jsonl").read_text().splitlines(keepends=True)
        (tmp_path / "gsm8k" / f"{name}.jsonl").write_text("".join(lines[:6]))
    (block,) = blocks((ROOT / "docs" / "gsm8k.md").read_text(), "sh")
    assert run_lines(block, tmp_path) == 4


def test_the_readmes_example_of_a_method_is_a_method():
    (example,) = blocks(README, "python")
    names: dict = {}
    exec(example, names)
    try:
        model = small_model()
        idx = torch.randint(50, (2, 6))
        before = model(idx)[0]
        layer = METHODS["scale"]
        inject(model, layer, layer.Config(8))
        torch.testing.assert_close(model(idx)[0], before)
        for name, p in model.named_parameters():
            if name.endswith(".a"):
                torch.nn.init.normal_(p, std=0.1)
        adapted = model(idx)[0]
        merge(model)
        torch.testing.assert_close(model(idx)[0], adapted)
        assert not torch.allclose(adapted, before)
    finally:
        del METHODS["scale"]


@pytest.mark.parametrize("flag", sorted(set(re.findall(r"`[^`]*?(--\w+)", README))))
def test_every_flag_of_the_readme_exists(flag):
    sources = " ".join(
        path.read_text() for path in [*ROOT.glob("rwkv_bone/**/*.py"), ROOT / "Makefile"] if path.name != "test_docs.py"
    )
    assert flag in sources or re.search(rf"\b{flag[2:]}\b", sources), flag
