"""The doctor: what it finds on this machine, and what it says where something is missing, broken or wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_bone import doctor
from rwkv_bone.errors import UserError, run
from rwkv_bone.ops import build, selfcheck, wkv6, wkv7
from rwkv_bone.ops.float32 import onednn_is_right
from rwkv_bone.ops.selfcheck import Verdict

ROOT = Path(doctor.__file__).resolve().parents[1]


def marks(findings, mark):
    return [finding for finding in findings if finding.mark == mark]


def bare_python(code: str, **environment) -> subprocess.CompletedProcess:
    """Run `code` in a Python that has this project and no installed package."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}"
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment, check=False)


def test_a_machine_that_runs_the_tests_can_train(capsys):
    assert doctor.main([]) == 0
    out = capsys.readouterr().out
    for title in doctor.SECTIONS:
        assert f"\n{title}\n" in f"\n{out}"
    assert f"ok    torch {torch.__version__}" in out
    assert "ok    --op torch on cpu, float32: right to" in out
    assert "WRONG" not in out
    assert out.splitlines()[-1].startswith("Training can work here, on the ")


def test_the_packages_are_those_of_pyproject():
    text = (ROOT / "pyproject.toml").read_text()
    required = re.search(r"^dependencies = \[(.*?)^\]", text, re.MULTILINE | re.DOTALL)[1]
    assert set(re.findall(r'"([^";]+)[^"]*"', required)) == {name + wanted for name, (wanted, _, _) in doctor.REQUIRED.items()}
    extras = re.search(r"^\[project.optional-dependencies\]\n(.*?)^test = ", text, re.MULTILINE | re.DOTALL)[1]
    assert set(re.findall(r'"([\w-]+)', extras)) == set(doctor.OPTIONAL)
    assert f'requires-python = "{doctor.PYTHON.split(",")[0]}' in text


@pytest.mark.parametrize(
    ("version", "wanted", "inside"),
    [
        ("2.13.0+cpu", ">=2.6,<2.14", True),
        ("2.14.0", ">=2.6,<2.14", False),
        ("2.5.1", ">=2.6,<2.14", False),
        ("2.6", ">=2.6,<2.14", True),
        ("0.19.8", ">=0.16", True),
        ("3.9.1", ">=3.10,<3.14", False),
        ("anything", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version, wanted, inside):
    assert doctor.within(version, wanted) is inside


def test_without_any_package_it_says_what_to_install_and_exits_with_1():
    result = bare_python("from rwkv_bone import doctor; sys.exit(doctor.main([]))")
    assert result.returncode == 1, result.stderr
    assert "FAIL  torch is missing, which is for everything\n        -> pip install 'torch>=2.6,<2.14'" in result.stdout
    assert "note  deepspeed is missing" in result.stdout
    assert "the World vocabulary was not tried: numpy is missing" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("Training cannot work here yet: torch is missing")


def test_a_broken_torch_is_one_line(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
    result = bare_python("from rwkv_bone import doctor; sys.exit(doctor.main([]))", PYTHONPATH=str(tmp_path))
    assert result.returncode == 1, result.stderr
    assert "FAIL  torch cannot be imported: libcudart.so.13: cannot open shared object file" in result.stdout


@pytest.mark.slow
def test_without_a_compiler_the_kernel_is_a_note_and_training_can_work(tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("CXX", None)
    command = [sys.executable, "-m", "rwkv_bone.doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    assert "note  C++ compiler: the CPU kernel needs a C++ compiler" in result.stdout
    assert "note  --op cpu on cpu, float32: the CPU kernel needs a C++ compiler" in result.stdout
    assert result.stdout.count("-> apt install g++") == 3  # the compiler, and the kernel in two dtypes
    assert "Training can work here, on the " in result.stdout


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("module", [wkv6, wkv7], ids=["wkv6", "wkv7"])
def test_a_kernel_that_is_a_little_wrong_is_found(module, monkeypatch):
    right = doctor.relative_errors("torch", "cpu", torch.float32, N=16)
    assert max(right.values()) < 1e-5 and len(right) == 8 + 9
    name = module.recurrence.name

    def wrong(log_w, op, **others):
        return module.recurrence.reference(log_w=1.01 * log_w, **others)

    monkeypatch.setattr(module, name, wrong)
    found = doctor.relative_errors("torch", "cpu", torch.float32, N=16)
    assert all(found[f"{name.upper()}'s {what}"] > 1e-4 for what in ("y", "final state", "gradient of log_w"))


@pytest.mark.parametrize("error", [0.5, float("nan")])
def test_a_wrong_kernel_is_told_and_no_right_one_is_a_failure(monkeypatch, error):
    monkeypatch.setattr(doctor, "relative_errors", lambda *args: {"y": 1e-7, "gradient of k": error})
    *found, last = doctor.kernels()
    assert all(f.mark == "note" and "WRONG, gradient of k is off by" in f.text and f.cure for f in found)
    assert last.mark == "FAIL"


def test_a_kernel_that_stops_does_not_stop_the_report(monkeypatch):
    def stop(op, *args):
        if op == "cpu":
            raise RuntimeError("illegal instruction\nat 0x0")
        return {"y": 1e-7}

    monkeypatch.setattr(doctor, "relative_errors", stop)
    monkeypatch.setattr(doctor, "kernel_cases", lambda: [("cpu", "cpu", "float32", 1e-4), ("torch", "cpu", "float32", 1e-4)])
    first, second = doctor.kernels()
    assert first.text == "--op cpu on cpu, float32: stopped with illegal instruction"
    assert second.mark == "ok"


def test_the_verdicts_on_a_gpus_kernels_are_shown(monkeypatch):
    def verdict(name, kernel, dtype, N, device):
        if name == "bone":
            raise UserError("no nvcc here")
        wrong = kernel == "sequential"
        return Verdict(not wrong, "y is off by 1e-01 (allowed 4e-03)" if wrong else "right to 3e-03")

    monkeypatch.setattr(selfcheck, "verdict", verdict)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    found = {f.text: f for f in doctor.gpu_kernels()}
    assert found["--op cuda on cuda, WKV6 chunk, bfloat16: right to 3e-03"].mark == "ok"
    wrong = found["--op cuda on cuda, WKV7 sequential, float32: y is off by 1e-01 (allowed 4e-03)"]
    assert wrong.mark == "note" and "not used" in wrong.cure
    assert found["--peft bone on cuda, BONE bone, bfloat16: no nvcc here"].mark == "note"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not [f for f in doctor.gpu_kernels() if "--op cuda" in f.text]


# ---------------------------------------------------------------- devices and disk


def with_gpu(monkeypatch, major: int, minor: int):
    properties = SimpleNamespace(name="Some GPU", major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda i: (20 << 30, 24 << 30))


def test_a_gpu_is_described_and_an_old_one_advised(monkeypatch):
    with_gpu(monkeypatch, 8, 9)
    cpu, gpu = doctor.devices()
    assert re.match(r"CPU: .+, \d+ cores", cpu.text)
    assert cpu.text.endswith("float32 products by oneDNN") == onednn_is_right()
    assert (gpu.mark, gpu.text) == ("ok", "GPU 0: Some GPU, 24.0 GiB of memory (20.0 free), compute capability 8.9")
    with_gpu(monkeypatch, 7, 5)
    _, gpu = doctor.devices()
    assert gpu.mark == "note" and "no arithmetic in bf16" in gpu.cure
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert [f.mark for f in doctor.devices()][1] == "ok"
    assert not [f for f in doctor.compilers() if "nvcc" in f.text]


@pytest.mark.parametrize(
    ("built_for", "driver", "text", "cure"),
    [
        (None, True, "built without CUDA", "pytorch.org"),
        ("13.0", True, "built for CUDA 13.0, but sees no GPU", "update its driver"),
        (None, False, "no GPU", "CPU"),
    ],
)
def test_a_gpu_that_torch_does_not_see_is_explained(monkeypatch, built_for, driver, text, cure):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/nvidia-smi" if driver else None)
    monkeypatch.setattr(doctor.os.path, "exists", lambda path: path == "/proc/cpuinfo")
    (note,) = marks(doctor.devices(), "note")
    assert text in note.text and cure in note.cure


def test_a_full_disk_is_noted(monkeypatch, tmp_path):
    monkeypatch.setattr(build, "cache_dir", lambda: tmp_path)
    (tmp_path / "kernel.so").write_bytes(bytes(1 << 20))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1 << 28))
    cache, here = doctor.disk()
    assert f"{tmp_path} (1.0 MiB): 0.2 GiB free" in cache.text
    assert cache.mark == here.mark == "note" and "make room" in here.cure


def test_an_argument_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        run(lambda: doctor.main(["--fix"]))
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: doctor takes no arguments, not --fix\n"


def test_a_compiler_that_does_not_run_is_told(monkeypatch):
    monkeypatch.setattr(build, "cxx_compiler", lambda: "/none/g++")
    monkeypatch.setattr(build, "ninja_binary", lambda: (_ for _ in ()).throw(UserError("no ninja; pip install ninja")))
    compiler, ninja = list(doctor.compilers())[:2]
    assert "does not run" in compiler.text
    assert (ninja.mark, ninja.text, ninja.cure) == ("note", "ninja: no ninja", "pip install ninja")
