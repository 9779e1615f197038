"""Odd and damaged input ends in success or in one line, and nothing is lost, left half written or written elsewhere."""

import json
import multiprocessing
import shutil
import signal

import pytest

from tests import fuzz

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return fuzz.make_world(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("kind", fuzz.KINDS, ids=lambda kind: kind.__name__)
def test_odd_input_ends_in_success_or_one_line_and_touches_nothing_else(kind, world, tmp_path):
    """In a process of its own: a crash or a hang there is a failure here. `python -m tests.fuzz KIND CASE` repeats one."""
    log = tmp_path / "log"
    process = multiprocessing.get_context("fork").Process(
        target=fuzz.main, args=(kind.__name__, range(fuzz.KINDS[kind]), world, log)
    )
    process.start()
    process.join(600)
    if process.is_alive():
        process.kill()
    lines = log.read_text().splitlines()
    assert process.exitcode == 0, f"case {lines[-1]}: ended by {signal.Signals(-(process.exitcode or -signal.SIGKILL)).name}"
    assert [json.loads(line) for line in lines if not line.isdigit()] == []
    assert len(lines) == fuzz.KINDS[kind]


@pytest.mark.parametrize("flags", ["", "--dataload get", "--dataload pack", "--train_type infctx --chunk_ctx 16"])
@pytest.mark.parametrize("size", ["1000000000", "99999999999999999999"])
def test_a_huge_micro_batch_is_sized_at_once(size, flags, world, tmp_path):
    """With the estimate of memory, which the cases above leave out."""
    folder = tmp_path / "case"
    shutil.copytree(world, folder)
    code, said = fuzz.called([*fuzz.TRAIN[:-1], "--micro_bsz", size, "--overwrite", *flags.split()], folder)
    assert code == 0 and "memory     about" in said, said


@pytest.mark.parametrize(
    "name, command",
    [
        ("base.pth", [*fuzz.MERGE, "--dtype", "fp32"]),
        ("base.st", "merge --base_model base.st --output m.pth --dtype fp32".split()),
        *((name, [*fuzz.MERGE, "--peft_checkpoint", name]) for name in ("bone.pth", "foreign.pth", "state.st")),
        ("peft/adapter_model.safetensors", [*fuzz.MERGE, "--peft_checkpoint", "peft"]),
    ],
)
def test_a_file_cut_short_anywhere_is_refused(name, command, world, tmp_path):
    folder = tmp_path / "case"
    shutil.copytree(world, folder)
    whole = (folder / name).read_bytes()
    for size in {0, 1, 7, 8, 9, 63, 64, len(whole) - 1, len(whole) - 22, *(len(whole) * i // 13 for i in range(13))}:
        (folder / name).write_bytes(whole[:size])
        code, said = fuzz.called(command, folder)
        assert code == 2 and said.startswith("error: ") and name in said, (size, code, said)
