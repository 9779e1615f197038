"""Building the kernels' libraries: once, by one process, whole or not at all, and with words that help."""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.ops import build
from rwkv_bone.ops.wkv6 import cpu as wkv6_cpu
from rwkv_bone.ops.wkv6 import wkv6

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture
def answer(tmp_path):
    """A source whose library has a function `answer` that returns 42."""
    source = tmp_path / "sources with space" / "answer.cpp"
    source.parent.mkdir()
    source.write_text('#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n')
    source.with_name("answer.h").write_text("#define ANSWER 42\n")
    return source


def build_answer(source: Path, cache: Path, compiler: str | None = None) -> Path:
    return build.build(
        "answer",
        [build.Object(source, ("-O1",))],
        compiler or build.cxx_compiler(),
        flags=("-fPIC",),
        cache=cache,
    )


def counting_compiler(folder: Path, before: str = "") -> Path:
    """A compiler that writes a line to `runs` for every object it makes, after running `before`."""
    script = folder / "c++"
    script.write_text(
        f'#!/bin/sh\ncase "$*" in *" -c "*) echo run >> "{folder}/runs"; {before} ;; esac\nexec {build.cxx_compiler()} "$@"\n'
    )
    script.chmod(0o755)
    return script


def runs(folder: Path) -> int:
    return (folder / "runs").read_text().count("run") if (folder / "runs").exists() else 0


def start_build(source: Path, cache: Path, compiler: Path) -> subprocess.Popen:
    """Another process that does what build_answer does and prints what `answer` returns."""
    program = (
        "import ctypes, pathlib, sys; from rwkv_bone.ops import build\n"
        "source, cache = map(pathlib.Path, sys.argv[1:3]); objects = [build.Object(source, ('-O1',))]\n"
        "library = build.build('answer', objects, sys.argv[3], flags=('-fPIC',), cache=cache)\n"
        "print(ctypes.CDLL(str(library)).answer())"
    )
    command = [sys.executable, "-c", program, source, cache, compiler]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=REPO)


def wait_for(condition, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_builds_once_and_again_only_when_a_source_changes(answer, tmp_path, capsys):
    compiler = str(counting_compiler(tmp_path))
    first = build_answer(answer, tmp_path, compiler)
    assert ctypes.CDLL(str(first)).answer() == 42
    message = capsys.readouterr().err
    assert message.startswith("rwkv-bone: building answer with c++, once ... ") and message.count("\n") == 1
    assert build_answer(answer, tmp_path, compiler) == first
    assert capsys.readouterr().err == "" and runs(tmp_path) == 1
    answer.with_name("answer.h").write_text("#define ANSWER 43\n")
    second = build_answer(answer, tmp_path, compiler)
    assert second != first and ctypes.CDLL(str(second)).answer() == 43 and runs(tmp_path) == 2
    assert not list(tmp_path.glob("*.build-*"))


def test_two_processes_at_once_build_once_and_both_get_it(answer, tmp_path):
    compiler = counting_compiler(tmp_path, before=f'while [ ! -e "{tmp_path}/go" ]; do sleep 0.02; done')
    first = start_build(answer, tmp_path, compiler)
    wait_for(lambda: runs(tmp_path) == 1)
    second = start_build(answer, tmp_path, compiler)
    assert "waiting for another process that builds answer" in second.stderr.readline()
    (tmp_path / "go").touch()
    assert first.communicate(timeout=60)[0] == second.communicate(timeout=60)[0] == "42\n"
    assert runs(tmp_path) == 1


def test_a_killed_build_leaves_nothing_that_hinders_the_next(answer, tmp_path):
    compiler = counting_compiler(tmp_path, before=f'[ -e "{tmp_path}/second" ] || sleep 30')
    process = start_build(answer, tmp_path, compiler)
    wait_for(lambda: runs(tmp_path) == 1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("*.so")) and list(tmp_path.glob("*.build-*"))
    (tmp_path / "second").touch()
    started = time.monotonic()
    assert ctypes.CDLL(str(build_answer(answer, tmp_path, str(compiler)))).answer() == 42
    assert time.monotonic() - started < 25, "waited for the killed build"
    assert not list(tmp_path.glob("*.build-*"))


def test_a_broken_source_gives_the_first_error_and_the_log(answer, tmp_path):
    answer.write_text("int answer() { return fourty_two; }\nint more() { return nothing; }\n")
    with pytest.raises(UserError, match=r"answer did not compile: .*error: .*fourty_two.*; full log: .*; or use --op torch") as e:
        build_answer(answer, tmp_path)
    assert "\n" not in str(e.value)
    log = next(tmp_path.glob("answer-*.log"))
    assert str(log) in str(e.value) and "nothing" in log.read_text()
    assert not list(tmp_path.glob("*.so")) and not list(tmp_path.glob("*.build-*"))


def test_what_nvcc_calls_fatal_is_told(answer, tmp_path):
    refusal = "nvcc fatal   : Unsupported gpu architecture 'compute_121'"
    compiler = counting_compiler(tmp_path, before=f'echo "{refusal}"; exit 1')
    with pytest.raises(UserError, match=rf"answer did not compile: {refusal}; full log: "):
        build_answer(answer, tmp_path, str(compiler))


def test_without_a_compiler_says_how_to_get_one_and_that_op_torch_needs_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    cure = r"apt install g\+\+ \(or conda install .*cxx-compiler\), or use --op torch"
    with pytest.raises(UserError, match=rf"needs a C\+\+ compiler and none of .*g\+\+.* is on PATH; {cure}"):
        build.cxx_compiler()


@pytest.mark.parametrize("grad", [False, True])
def test_the_op_tells_of_a_missing_compiler_and_op_torch_works(grad, tmp_path, monkeypatch):
    inputs = [torch.rand(1, 4, 2, 8).requires_grad_(grad) for _ in range(3)] + [-torch.rand(1, 4, 2, 8), torch.rand(2, 8)]
    with monkeypatch.context() as patch:
        for name in ("library", "entries", "variants"):  # as in a new process
            patch.delitem(vars(wkv6_cpu), name, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path))
        patch.setenv("PATH", str(tmp_path))
        patch.delenv("CXX", raising=False)
        with pytest.raises(UserError, match=r"needs a C\+\+ compiler"):
            wkv6(*inputs)
        y, _ = wkv6(*inputs, op="torch")
    torch.testing.assert_close(y, wkv6(*inputs)[0])


def test_the_compiler_that_conda_names_in_cxx_is_taken(tmp_path, monkeypatch):
    shutil.copy(counting_compiler(tmp_path), tmp_path / "my-c++")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("CXX", "my-c++")
    assert build.cxx_compiler() == str(tmp_path / "my-c++")


def test_ninja_is_found_where_pypi_puts_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    version = subprocess.run([build.ninja_binary(), "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("1.")


def test_without_ninja_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ninja", None)
    with pytest.raises(UserError, match="pip install ninja, or use --op torch"):
        build.ninja_binary()


def test_the_cache_follows_xdg_and_falls_back_with_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.cache_dir() == tmp_path / "cache" / "rwkv-bone" and capsys.readouterr().err == ""
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    folder = build.cache_dir()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    assert f"cannot write {tmp_path / 'file' / 'rwkv-bone'} (Not a directory); building in {folder}" in capsys.readouterr().err


def test_a_user_without_a_home_has_a_private_cache(tmp_path, monkeypatch, capsys):
    """In a container run as any user there is no $HOME and no entry in the list of users."""
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    folder = build.cache_dir()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0
    assert build.user_cache() == folder and capsys.readouterr().err == ""


def test_a_fallback_folder_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    build.cache_dir().chmod(0o777)
    again = build.cache_dir()
    assert again.stat().st_mode & 0o077 == 0 and again != tmp_path / f"rwkv-bone-{os.getuid()}"


def test_a_library_that_is_in_the_cache_needs_neither_ninja_nor_a_writable_folder(answer, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library = build_answer(answer, None)
    monkeypatch.setattr(build, "ninja_binary", None)
    monkeypatch.setattr(build, "cache_dir", None)
    assert build_answer(answer, None) == library


def test_a_damaged_library_is_named(tmp_path):
    (tmp_path / "answer.so").write_bytes(b"\x7fELF half a library")
    with pytest.raises(UserError, match=r"cannot load .*answer.so: .*; delete it to build it anew, or use --op torch"):
        build.load(tmp_path / "answer.so")


@pytest.mark.parametrize("path", ["cpp/wkv6_cpu.cpp", "cuda/bone.cu"])
def test_sources_are_found_beside_the_package_and_inside_an_installed_one(path, tmp_path, monkeypatch):
    assert build.source(path) == REPO / path
    package = tmp_path / "site-packages" / "rwkv_bone"
    (package / "ops").mkdir(parents=True)
    monkeypatch.setattr(build, "__file__", str(package / "ops" / "build.py"))
    with pytest.raises(UserError, match=f"sources are missing: looked for .*/{path} and .*rwkv_bone/{path}; reinstall"):
        build.source(path)
    (package / path).parent.mkdir()
    (package / path).touch()
    assert build.source(path) == package / path
