"""Two devices train as one does with the same samples a step: DDP, and DeepSpeed ZeRO 1, 2, 3, on CPUs over gloo."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import open_tensors
from rwkv_bone.training import resume
from rwkv_bone.training.outputs import RunFolder
from tests.runs import ROOT, DieAt, arguments, assert_same_run, lines, losses, make_world, run_to_end

ZERO = [f"deepspeed_stage_{stage}" for stage in ("1", "2", "3")]
OFFLOAD = ["deepspeed_stage_2_offload", "deepspeed_stage_3_offload"]
# Adam with this eps is plain gradient descent: unlike Adam it feels a gradient that is off by a factor
DESCENT = ("--beta1", "0", "--beta2", "0", "--adam_eps", "1e4", "--lr_init", "2e2", "--layerwise_lr", "0")
KINDS = {  # plain with RWKV-6, the others with RWKV-7
    "plain": (),
    "accumulated": ("--accumulate_grad_batches", 2, "--grad_clip", 0.05),
    "infctx": ("--train_type", "infctx", "--chunk_ctx", 8, "--grad_cp", 1, "--accumulate_grad_batches", 2),
}
CASES = [(engine, "accumulated") for engine in ("ddp", *ZERO)] + [(engine, "plain") for engine in ("ddp", "deepspeed_stage_3")]
CASES += [(engine, "accumulated") for engine in OFFLOAD] + [(engine, "infctx") for engine in ("ddp", "deepspeed_stage_3")]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("engines"), rows=19)  # which two devices cannot share evenly
    (folder / "x060").mkdir()
    make_world(folder / "x060", rows=19, version="x060")
    return folder


def run(world, name: str, *flags, ranks: int = 2):
    ended = run_to_end(world, *flags, "--devices", ranks, name=name, ranks=ranks)
    assert ended.codes == [0] * ranks, ended.said
    return world / name


def base_of(world, kind: str):
    return world / "x060" if kind == "plain" else world


@pytest.fixture(scope="module")
def one_device(world):
    return {kind: run(base_of(world, kind), kind, *DESCENT, "--micro_bsz", 4, *KINDS[kind], ranks=1) for kind in KINDS}


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), CASES)
def test_two_devices_equal_one(world, one_device, engine, kind):
    ours = run(base_of(world, kind), f"{engine}_{kind}", *DESCENT, "--micro_bsz", 2, "--strategy", engine, *KINDS[kind])
    expected = lines(one_device[kind])
    assert min(line["grad_norm"] for line in expected) > 0.1  # clipping does something
    for line, other in zip(lines(ours), expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(other[name], rel=1e-5), (line["step"], name)
        assert (line["trained"], line["tokens"], line["lr"]) == (other["trained"], other["tokens"], other["lr"])
    ours, theirs = (open_tensors(folder / "rwkv-0.pth") for folder in (ours, one_device[kind]))
    assert ours.keys() == theirs.keys() and max(t.abs().max() for t in theirs.values()) > 1e-4  # they began as zeros
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.slow
def test_two_devices_by_the_command_line_as_users_type_it(world):
    ours = run(world, "torchrun", "--strategy", "ddp")
    argv = [sys.executable, str(ROOT / "train.py"), *arguments(world, "--devices", 2, "--strategy", "ddp", name="typed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("6 steps") == 0 and done.stdout.count("model  ") == 1  # the first device alone speaks
    assert_same_run(ours, world / "typed")


class Starts:
    """In a process, writes down what the training would start from, and how many decompositions it took, and ends the run."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self) -> None:
        from rwkv_bone.peft import adapter_tensors
        from rwkv_bone.training import run as training

        counts = []
        for place, name in ((torch, "svd_lowrank"), (torch.linalg, "qr")):
            real = getattr(place, name)
            setattr(place, name, lambda *a, real=real, **more: counts.append(1) or real(*a, **more))

        def fit(model, data, objective, config, engine) -> int:
            torch.save((adapter_tensors(model), len(counts)), self.folder / f"rank-{engine.rank}.pt")
            return 0

        training.fit = fit


@pytest.mark.parametrize("method", ["pissa", "olora", "lora_ga"])
def test_a_start_is_computed_by_one_device_and_is_that_of_all(world, tmp_path, method):
    """By a seed that every process draws for itself."""
    flags = ("--peft", method, "--random_seed", -1, "--devices", 2, "--strategy", "ddp")
    ended = run_to_end(world, *flags, name=f"start_{method}", ranks=2, in_each=Starts(tmp_path))
    assert ended.codes == [0, 0], ended.said
    (first, computed), (second, computed_again) = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert computed > 0 and computed_again == 0
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert all(t.any() for t in first.values())


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "deepspeed_stage_1", "deepspeed_stage_2"])
def test_two_devices_answer_prompts_as_one_does(world, engine):
    """The first device asks, and the others wait for it."""
    flags = (*DESCENT, "--sample_prompt", "1 and", "--sample_prompt", "7", "--sample_every", 2, "--epoch_count", 2)
    one = run(world, f"asks_{engine}", *flags, "--micro_bsz", 4, ranks=1)
    two = run(world, f"{engine}_asks", *flags, "--micro_bsz", 2, "--strategy", engine)
    assert losses(two) == [(step, pytest.approx(loss, rel=1e-5)) for step, loss in losses(one)]
    answers = [json.loads(line) for line in (two / "samples.jsonl").read_text().splitlines()]
    assert [a["step"] for a in answers[::2]] == [0, 2, 4, 6, 8, 10] and {a["prompt"] for a in answers} == {"1 and", "7"}
    assert answers == [json.loads(line) for line in (one / "samples.jsonl").read_text().splitlines()]
    assert len({a["text"] for a in answers}) > 2  # training changes them


# a base in bf16 and trained parts of it: float32 masters count;  dropout: random numbers count
MIXED = ("--peft", "lora", "--lora_dropout", "0.2", "--precision", "bf16", "--epoch_count", 2, "--lr_init", "1e-3",
         "--save_every_steps", 2, "--resume", "auto")  # fmt: skip
PARTS = {"deepspeed_stage_1": ("time", "ln"), "deepspeed_stage_2": ("time", "ln"), "deepspeed_stage_3": ()}


@pytest.fixture(scope="module")
def mixed_by_ddp(world):
    parts = set(PARTS.values())
    return {p: run(world, f"mixed{len(p)}", *MIXED, "--train_parts", *p, "--strategy", "ddp") for p in parts}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ZERO)
def test_zero_keeps_float32_masters_and_goes_on_bitwise(world, mixed_by_ddp, engine):
    parts = PARTS[engine]
    flags = (*MIXED, "--train_parts", *parts, "--strategy", engine)
    unbroken = run(world, f"mixed_{engine}", *flags)
    assert losses(unbroken) == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in losses(mixed_by_ddp[parts])]
    ours, theirs = (open_tensors(folder / "rwkv-1.pth") for folder in (unbroken, mixed_by_ddp[parts]))
    assert {name: (t.dtype, t.shape) for name, t in ours.items()} == {name: (t.dtype, t.shape) for name, t in theirs.items()}
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=2**-7, atol=2e-3, msg=name)
    if engine == "deepspeed_stage_1":
        return
    killed = world / f"killed_{engine}"
    ended = run_to_end(world, *flags, "--devices", 2, name=killed.name, ranks=2, before=DieAt(killed, 34))
    assert ended.codes[0] == -signal.SIGKILL and 0 < resume.steps_saved(RunFolder(killed))[0] < len(losses(unbroken)), ended.said
    assert run_to_end(world, *flags, "--devices", 2, name=killed.name, ranks=2).codes == [0, 0]
    assert_same_run(unbroken, killed)


def test_zero_3_refuses_two_dtypes(world):
    flags = (*MIXED, "--train_parts", "ln", "--strategy", "deepspeed_stage_3")
    ended = run_to_end(world, *flags, name="refused")
    assert ended.codes == [2] and "stage 2 does" in ended.said


@pytest.mark.slow
def test_zero_3_saves_the_whole_model(world):
    flags = ("--peft", "none", "--epoch_steps", 2, "--lr_init", "3e-2")  # so that steps show in the bf16 file
    ours = run(world, "whole_zero", *flags, "--strategy", "deepspeed_stage_3")
    theirs = run(world, "whole_ddp", *flags, "--strategy", "ddp")
    models = [load_model(folder / "rwkv-0.pth") for folder in (ours, theirs)]
    base = load_model(world / "base.pth", torch.float32)
    for (name, a), b, before in zip(models[0].state_dict().items(), models[1].state_dict().values(), base.state_dict().values()):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-3, msg=name)  # bf16 neighbours
        assert not torch.equal(a, before), name
