"""Runs that are killed, stopped or out of disk go on from their checkpoints as if nothing had happened."""

import csv
import random
import resource
import shutil
import signal
import sys
import time
from types import SimpleNamespace

import pytest

from rwkv_bone.config import TrainConfig
from rwkv_bone.errors import UserError
from rwkv_bone.training import resume, signals
from rwkv_bone.training.outputs import RunFolder
from rwkv_bone.training.resume import load_state
from tests.runs import DieAt, Processes, arguments, assert_same_run, losses, make_world, run_to_end, slurm, torchrun

# dropout, as random numbers count; trained parts of the base, as not all that trains is an adapter
FLAGS = ("--peft", "lora", "--lora_dropout", "0.2", "--train_parts", "time", "--epoch_count", "2", "--save_every_steps", "2",
         "--micro_bsz", "2", "--accumulate_grad_batches", "2", "--resume", "auto")  # fmt: skip
STEPS = 12


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("resume"))


@pytest.fixture(scope="module")
def unbroken(world):
    ended = run_to_end(world, *FLAGS, name="unbroken")
    assert ended.codes == [0] and len(losses(world / "unbroken")) == STEPS, ended.said
    return world / "unbroken"


@pytest.fixture(scope="module")
def unbroken_on_two(world):
    ended = run_to_end(world, *FLAGS, "--devices", 2, name="unbroken_on_two", ranks=2)
    assert ended.codes == [0, 0] and len(losses(world / "unbroken_on_two")) == STEPS / 2, ended.said
    return world / "unbroken_on_two"


def steps_saved(folder) -> list[int]:
    return resume.steps_saved(RunFolder(folder))


def checkpoint(folder, step: int):
    return folder / resume.name_of(step)


def resume_until_the_end(world, name: str, deaths, ranks: int = 1) -> int:
    """Run with each of `deaths` (in the first process) in turn, then without; the number of runs that were killed."""
    for killed, death in enumerate([*deaths, None]):
        ended = run_to_end(world, *FLAGS, "--devices", ranks, name=name, ranks=ranks, before=death)
        assert ended.codes[0] in (0, -signal.SIGKILL), ended.said
        if ended.codes[0] == 0:
            return killed
        assert 0 not in ended.codes  # the others do not wait for ever, and do not call it a success
    raise AssertionError(f"did not end: {ended.said}")


def test_a_run_that_is_killed_at_any_file_operation_goes_on_bitwise(world, unbroken):
    counts = random.Random(0).choices(range(1, 50), k=50)
    folder = world / "killed"
    assert resume_until_the_end(world, folder.name, [DieAt(folder, count) for count in counts]) >= 3
    assert_same_run(unbroken, folder)
    assert not list(folder.glob("**/*.tmp"))
    rows = list(csv.DictReader((folder / "metrics.csv").open()))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == losses(unbroken)  # every step once


def test_validation_is_part_of_what_goes_on(world):
    flags = (*FLAGS, "--val_split", "0.2", "--val_every", 1, "--lr_schedule", "cos", "--warmup_steps", 4)
    assert run_to_end(world, *flags, name="val").codes == [0]
    folder = world / "val_killed"
    for count in (19, 31, 40, None):
        ended = run_to_end(world, *flags, name=folder.name, before=count and DieAt(folder, count))
        assert ended.codes == [-signal.SIGKILL if count else 0], ended.said
    assert_same_run(world / "val", folder)
    assert (folder / "val_data.jsonl").read_text() == (world / "val" / "val_data.jsonl").read_text()


def test_a_run_that_ended_early_stays_ended(world):
    flags = (*FLAGS, "--val_split", "0.2", "--val_every", 1, "--patience", 2, "--lr_init", "0")
    for _ in range(2):
        assert run_to_end(world, *flags, name="patience").codes == [0]
        assert len(losses(world / "patience")) == 3 and (world / "patience" / "rwkv-0.pth").exists()
    longer = [flag if flag != 2 else 4 for flag in flags]
    assert run_to_end(world, *longer, name="patience").codes == [0]
    assert len(losses(world / "patience")) == 5


def test_a_run_that_is_killed_at_any_time_goes_on_bitwise(world, unbroken):
    chance = random.Random(0)
    folder = world / "any_time"
    for _ in range(4):
        run = Processes(arguments(world, *FLAGS, name=folder.name), folder)
        while run.processes[0].is_alive() and not (folder / "loss_data.jsonl").exists():
            time.sleep(0.005)
        time.sleep(chance.uniform(0, 0.25))
        run.signal(signal.SIGKILL)
        run.end()
    assert resume_until_the_end(world, folder.name, []) == 0
    assert_same_run(unbroken, folder)


@pytest.mark.slow
def test_two_devices_of_which_the_first_is_killed_go_on_bitwise(world, unbroken_on_two):
    folder = world / "killed_on_two"
    deaths = [DieAt(folder, count) for count in (9, 31, 24)]
    assert resume_until_the_end(world, folder.name, deaths, ranks=2) >= 2
    assert_same_run(unbroken_on_two, folder)


def test_two_devices_of_which_the_second_is_killed_end_soon_and_go_on(world, unbroken_on_two):
    folder = world / "second_killed"
    flags = (*FLAGS, "--devices", 2)
    run = Processes(arguments(world, *flags, name=folder.name), folder, ranks=2)
    while not ((folder / "loss_data.jsonl").exists() and len(losses(folder)) >= 3):
        time.sleep(0.005)
    run.signal(signal.SIGKILL, rank=1)
    ended = run.end(60)
    assert ended.codes[0] not in (0, -signal.SIGKILL) and "--resume auto" in ended.said
    assert run_to_end(world, *flags, name=folder.name, ranks=2).codes == [0, 0]
    assert_same_run(unbroken_on_two, folder)


@pytest.mark.parametrize(
    ("number", "ranks", "launcher"),
    [(signal.SIGINT, 1, None), (signal.SIGTERM, 1, None), (signal.SIGHUP, 1, None),
     (signal.SIGTERM, 2, torchrun), (signal.SIGUSR1, 2, slurm)],
)
def test_a_signal_saves_this_step_and_ends_with_its_code(world, request, number, ranks, launcher):
    whole = request.getfixturevalue("unbroken" if ranks == 1 else "unbroken_on_two")
    folder = world / f"signal{number}_{ranks}"
    flags = (*FLAGS, "--devices", ranks, "--save_every_steps", 0)
    run = Processes(arguments(world, *flags, name=folder.name), folder, ranks, launcher=launcher or torchrun)
    while not ((folder / "loss_data.jsonl").exists() and losses(folder)):
        time.sleep(0.005)
    run.signal(number)  # to the first alone: the others hear of it
    if ranks == 1:
        run.signal(number)  # a key that was pressed twice
    ended = run.end()
    done = len(losses(folder))
    assert ended.codes == [128 + number] + [0] * (ranks - 1), ended.said
    assert done < len(losses(whole)) and steps_saved(folder)[0] == done
    assert (folder / "rwkv-interrupted.pth").exists()
    assert run_to_end(world, *flags, name=folder.name, ranks=ranks).codes == [0] * ranks
    assert_same_run(whole, folder)
    assert not list(folder.glob("rwkv-interrupted*"))  # rwkv-0.pth is later


@pytest.mark.parametrize(("launcher", "echo"), [(None, 0.1), ("LOCAL_RANK", 1)])
def test_a_second_signal_ends_the_run_at_once_unless_it_is_the_echo_of_the_first(launcher, echo, monkeypatch, capsys):
    now = [100.0]
    for name in signals.LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "0")
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with signals.Signals() as received:
        for later in (0, echo):
            now[0] += later
            signal.raise_signal(signal.SIGINT)
        assert received.received == signal.SIGINT and "saving" in capsys.readouterr().out
        now[0] += 1.5 * echo + 0.1
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGINT)
    assert ended.value.code == 130 and "without saving" in capsys.readouterr().out


def test_the_last_checkpoints_are_kept_and_are_small(world, unbroken):
    assert steps_saved(unbroken) == [12, 10]
    state = load_state(checkpoint(unbroken, 12))
    trained = sum(t.numel() * t.element_size() for t in state["trained"].values())
    # the values, two moments and a few kilobytes for each tensor's names and paddings
    assert checkpoint(unbroken, 12).stat().st_size < 3 * trained + 2000 * len(state["trained"])


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(world, unbroken):
    name = "damaged"
    assert run_to_end(world, *FLAGS, name=name, before=DieAt(world / name, 27)).codes == [-signal.SIGKILL]
    newest, before, *_ = steps_saved(world / name)
    path = checkpoint(world / name, newest)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    ended = run_to_end(world, *FLAGS, name=name)
    assert f"step-{newest:08d}.ckpt: damaged" in ended.said and f"after step {before}" in ended.said
    assert_same_run(unbroken, world / name)


def test_where_every_checkpoint_is_damaged_nothing_is_lost(world, unbroken):
    name = "all_damaged"
    shutil.copytree(unbroken, world / name)
    for step in steps_saved(world / name):
        checkpoint(world / name, step).write_bytes(b"PK")
    files = {path: path.stat().st_mtime for path in (world / name).rglob("*.*")}
    ended = run_to_end(world, *FLAGS, name=name)
    assert ended.codes == [2] and ended.said.count("error: ") == 1
    assert files == {path: path.stat().st_mtime for path in (world / name).rglob("*.*")}


class FullDisk:
    """Called in a process: once `folder` holds a checkpoint no file grows beyond `size` bytes."""

    def __init__(self, folder, size: int):
        self.folder, self.size = folder, size

    def __call__(self) -> None:
        def hook(event: str, args: tuple) -> None:
            if event == "open" and steps_saved(self.folder):
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        sys.addaudithook(hook)


def test_a_disk_that_fills_up_stops_the_run_and_leaves_what_was_saved(world, unbroken):
    name = "full"
    ended = run_to_end(world, *FLAGS, name=name, before=FullDisk(world / name, 30_000))
    assert ended.codes == [2] and "cannot be written (File too large)" in ended.said
    assert ended.said.count("\n") == ended.said[: ended.said.index("error: ")].count("\n") + 1  # one line, the last
    assert steps_saved(world / name) == [2]
    assert run_to_end(world, *FLAGS, name=name).codes == [0]
    assert_same_run(unbroken, world / name)


def test_a_finished_run_is_left_as_it_is(world, unbroken):
    files = {path: path.read_bytes() for path in unbroken.rglob("*.*")}
    assert "complete" in run_to_end(world, *FLAGS, name="unbroken").said
    without = [flag for flag in FLAGS if flag not in ("--resume", "auto")]
    refused = run_to_end(world, *without, name="unbroken")
    assert refused.codes == [2] and "--overwrite replaces it" in refused.said
    assert files == {path: path.read_bytes() for path in unbroken.rglob("*.*")}


def test_results_without_a_checkpoint_are_not_overwritten(world, unbroken):
    folder = world / "results"
    folder.mkdir()
    (folder / "rwkv-0.pth").write_bytes(b"mine")
    ended = run_to_end(world, *FLAGS, name="results")
    assert ended.codes == [2] and "not a file of a run" in ended.said
    assert (folder / "rwkv-0.pth").read_bytes() == b"mine"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--micro_bsz", "3"), "--micro_bsz"),
        (("--r", "4"), "--peft_options"),
        (("--loss_mask", "all"), "--loss_mask"),
        (("--devices", "2"), "devices"),
    ],
)
def test_a_run_goes_on_only_as_it_was_begun(world, unbroken, flags, message):
    before = checkpoint(unbroken, STEPS).read_bytes()
    ended = run_to_end(world, *FLAGS, *flags, name="unbroken", ranks=2 if "--devices" in flags else 1)
    assert set(ended.codes) == {2} and "the run was begun with " + message in ended.said
    assert checkpoint(unbroken, STEPS).read_bytes() == before


@pytest.mark.parametrize("flags", [
    "--ctx_len 16", "--encoding utf-16-le", "--tokenizer byte", "--template g1", "--fields text=t", "--format text",
    "--data_rows 1:", "--dataload pack", "--train_type infctx", "--accumulate_grad_batches 1", "--random_seed 2",
    "--val_split 0.1", "--optim sgd",
])  # fmt: skip
def test_all_that_decides_what_is_trained_must_agree(world, flags):
    def invariants(*more):
        config = TrainConfig.from_argv(arguments(world, *FLAGS, *more))
        return resume.invariants(SimpleNamespace(fingerprint=""), SimpleNamespace(invariants=dict), config, 1)

    resume.check_invariants(invariants(), invariants("--lr_init", "1"))
    with pytest.raises(UserError, match=f"the run was begun with {flags.split()[0]} "):
        resume.check_invariants(invariants(), invariants(*flags.split()))


def test_an_early_end_that_is_killed_at_any_file_operation_still_gets_its_result(world):
    flags = (*FLAGS, "--val_split", "0.2", "--val_every", 1, "--patience", 1, "--lr_init", "0")
    assert run_to_end(world, *flags, name="early").codes == [0]
    whole = world / "early"
    assert len(losses(whole)) == 2 and (whole / "rwkv-0.pth").exists()
    killed = 0
    for count in range(24, 60, 9):
        folder = world / f"early{count}"
        codes = run_to_end(world, *flags, name=folder.name, before=DieAt(folder, count)).codes
        if codes == [0]:
            break
        killed += 1
        assert run_to_end(world, *flags, name=folder.name).codes == [0]
        assert_same_run(whole, folder)
    assert killed > 1


def test_a_new_seed_is_drawn_and_kept_when_the_run_goes_on(world, unbroken):
    flags, folder = [*FLAGS, "--random_seed", "-1"], world / "seed"
    assert run_to_end(world, *flags, name="seed", before=DieAt(folder, 27)).codes == [-signal.SIGKILL]
    seed = load_state(checkpoint(folder, steps_saved(folder)[0]))["seed"]
    assert run_to_end(world, *flags, name="seed").codes == [0]
    assert load_state(checkpoint(folder, STEPS))["seed"] == seed > 0
    assert losses(folder) != losses(unbroken)
