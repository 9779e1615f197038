"""What README and docs say is run: every command, and the example of a method of one's own."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rwkv_bone.checkpoint import save_tensors
from rwkv_bone.peft import METHODS, inject, merge
from conftest import small_model

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.M | re.S)


def test_the_readmes_own_run_works_line_by_line(tmp_path):
    model = small_model(dtype=torch.float32, vocab_size=257, n_embd=64, dim_att=64, dim_ffn=64)
    save_tensors(tmp_path / "base.pth", {name: t.bfloat16() for name, t in model.state_dict().items()})
    rows = [{"question": f"What is {i}?", "answer": f"A number, {i}."} for i in range(8)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (own,) = [block for block in blocks(README, "sh") if "train.py" in block]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = []
    for line in own.splitlines():
        words = shlex.split(line, comments=True)
        if words[:2] == ["pip", "install"]:
            continue  # this environment is what it makes
        if words[1] in ("train.py", "merge.py"):
            words[1] = str(ROOT / words[1])
        result = subprocess.run(
            [sys.executable, *words[1:]], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, line + result.stdout + result.stderr
        ran.append(line)
    assert len(ran) == 4 and (tmp_path / "tuned.pth").exists()


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
