"""benchmarks/gpu.sh: each stage of what awaits a GPU runs by itself, and none ends another."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
gpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gpu)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_stage_that_fails_or_hangs_does_not_end_the_others(tmp_path, capfd):
    hang = "import os, subprocess, time; print('begun', flush=True); subprocess.Popen(['sleep', '60']); time.sleep(60)"
    began = time.monotonic()
    ended = gpu.orchestrate(
        {"fails": (python("print('half'); 1 / 0"), 30), "hangs": (python(hang), 2), "works": (python("print('whole')"), 30)},
        tmp_path, 100,
    )  # fmt: skip
    assert time.monotonic() - began < 50  # what a stage started is ended with it
    assert ended["fails"].startswith("ended with 1") and ended["hangs"].startswith("cut off") and ended["works"].endswith(" s")
    assert "ZeroDivisionError" in (tmp_path / "fails.txt").read_text()
    assert (tmp_path / "hangs.txt").read_text() == "begun\n" and "whole" in (tmp_path / "works.txt").read_text()
    late = gpu.orchestrate({"works": (python("print('whole')"), 30)}, tmp_path, 0)
    assert late == {"works": "not begun: no time was left"}


def test_what_a_stage_found_before_it_failed_is_in_the_summary(tmp_path):
    stage = gpu.Stage("steps", tmp_path, rehearse=True)
    stage.attempt("one", lambda: {"tokens/s": 1234.5})
    stage.attempt("two", lambda: 1 / 0)
    stage.attempt("three", lambda: {"skipped": "not here"})
    lines = (tmp_path / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["item"] for line in lines] == ["one", "two", "three"]
    text = gpu.summary(tmp_path, {"machine": "not begun: no time was left", "steps": "ended with 1 after 2 s"})
    assert "one                          tokens/s 1234" in text and "not here" in text
    assert "two                          failed ZeroDivisionError" in text


def test_without_a_gpu_it_says_so():
    if importlib.import_module("torch").cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and "torch sees no GPU here; --rehearse" in done.stderr


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_every_stage_runs_from_a_plain_checkout_without_what_may_be_missing(tmp_path):
    checkout = tmp_path / "checkout"
    parts = ("rwkv_bone", "cuda", "cpp", "benchmarks", "tests")
    for part in parts:
        shutil.copytree(ROOT / part, checkout / part, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for file in ("train.py", "pyproject.toml"):
        shutil.copy(ROOT / file, checkout)
    hidden = tmp_path / "hidden"  # packages that are not there
    hidden.mkdir()
    missing = ("fla", "deepspeed", "pyrwkv_tokenizer", "bitsandbytes", "peft", "tokenizers", "rwkv")
    (hidden / "sitecustomize.py").write_text(
        f"import sys\n\nclass Hidden:\n    def find_spec(self, name, *_):\n        if name.split('.')[0] in {missing}:\n"
        "            raise ModuleNotFoundError(name)\n\nsys.meta_path.insert(0, Hidden())\n"
        "import importlib.util\nfind = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *x: None if name.split('.')[0] in {missing} else find(name, *x)\n"
    )
    folder = tmp_path / "results"
    command = ["bash", str(checkout / "benchmarks" / "gpu.sh"), str(folder), "--rehearse", "--minutes", "6"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(PYTHONPATH=str(hidden)), cwd=tmp_path)
    text = (folder / "summary.txt").read_text()
    assert done.returncode == 0 and done.stdout.endswith(text + "\n"), done.stderr
    headings = [line for line in text.splitlines()[1:] if not line.startswith(" ")]
    assert [line.split()[0] for line in headings] == list(gpu.STAGES) and all(line.endswith(" s)") for line in headings), text
    assert not [line for line in headings if "ended" in line or "cut off" in line], text
    if shutil.which("nvcc"):
        assert "failed" not in text and "WRONG" not in text, text
    assert "equal within bf16" in text and "bitsandbytes is not installed" in text and len(text.splitlines()) < 60
