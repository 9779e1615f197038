"""The program says whether a run learns: rates and warnings before it, samples while it goes on, a verdict at its end."""

import contextlib
import io
import json
import math
import shlex
import sys
import types

import pytest
import torch

from rwkv_bone.config import TrainConfig
from rwkv_bone.errors import UserError
from rwkv_bone.files.models import load_model
from rwkv_bone.training.ending import Course
from rwkv_bone.training.losses import first_and_last
from rwkv_bone.training.outputs import RunFolder
from rwkv_bone.training.run import main
from rwkv_bone.training.samples import Sampler
from rwkv_bone.training.verdict import Held, before, verdict, worth
from tests.runs import ROOT, arguments, losses, make_world, program


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("learning"))
    rows = [{"question": f"What is {i} and {i}?", "answer": f"It is {2 * i}."} for i in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(world, *flags, name: str) -> str:
    """Run to the end; what it said."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(arguments(world, *flags, name=name)) == 0
    return said.getvalue()


@pytest.fixture(scope="module")
def pairs(world):
    return ("--data_file", world / "pairs.jsonl", "--ctx_len", 64, "--val_split", "0.2", "--epoch_count", 2)


@pytest.fixture(scope="module")
def asked(world, pairs):
    """What a run with samples and held-out data said, and its folder."""
    prompts = ("--sample_prompt", "What is 3 and 3?", "--sample_prompt", "-5?", "--sample_every", 4)
    return train(world, *pairs, *prompts, "--val_first", 1, name="asked"), RunFolder(world / "asked")


# ---------------------------------------------------------------- before the first step


@pytest.mark.parametrize("method", ["bone", "lora", "none"])
def test_the_recommended_rate_is_used_and_printed_where_none_is_given(world, method, capsys):
    argv = arguments(world, "--peft", method, "--dry_run", 1, name=f"rate-{method}")
    argv = [word for flag, word in zip(argv[::2], argv[1::2]) if flag != "--lr_init" for word in (flag, word)]
    assert main(argv) == 0
    rate = load_model(world / "base.pth").recommended_rate(method)
    assert f"rate       {rate:g}, constant, 0 warm-up steps; recommended for" in capsys.readouterr().out
    assert main([*argv, "--lr_final", "0"]) == 0
    assert f"exp, {rate:g} to 0," in capsys.readouterr().out
    assert main([*argv, "--lr_init", "2e-5"]) == 0
    assert "rate       2e-05, constant, 0 warm-up steps\n" in capsys.readouterr().out


def config(**given) -> TrainConfig:
    return TrainConfig(**{"data_file": "x", "load_model": "m", "lr_init": 1e-3, "lr_final": 1e-3, **given})


@pytest.mark.parametrize("schedule", ["constant", "linear", "cos"])
def test_a_run_is_worth_the_sum_of_its_rates(schedule):
    given = config(lr_schedule=schedule, lr_final=0, lr_init=2e-3)
    assert worth(1000, given, 1e-3) == pytest.approx(2000 if schedule == "constant" else 1000, rel=0.01)
    assert worth(10**7, given, 1e-3) == pytest.approx(2e7 if schedule == "constant" else 1e7, rel=0.01)


@pytest.mark.parametrize(
    ("given", "samples", "said"),
    [
        ({"lr_init": 2e-5, "lr_final": 2e-5}, 60, "8 steps at 2e-05 will hardly change the model: for 60 samples try "
                                                  "--epoch_count 10 --lr_init 0.001"),
        ({}, 60, "8 steps at 0.001 will hardly change the model: for 60 samples try --epoch_count 10"),
        ({"epoch_count": 10}, 60, ""),
        ({}, 800, ""),
        ({}, 5, "1 step at 0.001 will hardly change the model: for 5 samples try --micro_bsz 1 --epoch_count 16"),
        ({"epoch_count": 10, "lr_init": 1e-4, "lr_final": 1e-4}, 60, "80 steps at 0.0001 will hardly change the model: "
                                                                     "for 60 samples try --lr_init 0.001"),
        ({"lr_init": 1.0, "lr_final": 1.0}, 800, "--lr_init 1 is 1,000 times the recommended rate, 0.001: the loss may rise"),
        ({"load_model": "", "peft": "none"}, 60, ""),
    ],
)  # fmt: skip
def test_too_few_steps_are_told_with_what_to_try(given, samples, said):
    given = config(**given)
    line = before(given, -(-samples // given.micro_bsz), samples, 1, 1e-3)
    assert line == (said and f"warning: {said}")
    if "try" in said:  # and what it says is enough
        flags = f"--load_model m --data_file x --epoch_count {given.epoch_count} --lr_init {given.lr_init}"
        advised = TrainConfig.from_argv(f"{flags} {said.split('try ')[1]}".split())
        assert before(advised, -(-samples // advised.micro_bsz), samples, 1, 1e-3) == ""


def test_steps_beyond_the_data_and_much_that_is_cut_are_told(world):
    said = " ".join(train(world, "--epoch_steps", 500, "--ctx_len", 8, "--dry_run", 1, name="dry").split())
    assert "--epoch_steps 500 is more than the data hold: an epoch has 6 steps; for more, --epoch_count" in said
    assert "of the tokens are cut off: --ctx_len " in said and not (world / "dry").exists()
    assert "cut off" not in train(world, "--ctx_len", 64, "--dry_run", 1, name="dry")


# ---------------------------------------------------------------- while it goes on


def test_samples_are_logged_from_before_the_first_step_to_the_end_and_are_the_models_greedy_answers(world, asked):
    said, folder = asked
    answers = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [(a["step"], a["prompt"]) for a in answers] == [
        (step, prompt) for step in (0, 4, 8, 10) for prompt in ("What is 3 and 3?", "-5?")
    ]
    base = load_model(world / "base.pth", torch.float32)
    asking = ["-m", "rwkv_bone.generate", "--model", world / "base.pth", "--instruct", "--prompt", "What is 3 and 3?",
              "--temperature", "0", "--alpha_presence", "0", "--alpha_frequency", "0", "--max_tokens", "100"]  # fmt: skip
    assert answers[0]["text"] == program(asking, world).stdout.strip() and base.sizes.vocab_size == 257
    assert "sample after step 4: What is 3 and 3?" in said


def test_samples_change_nothing_of_the_training(world, pairs, asked):
    train(world, *pairs, name="unasked")
    assert losses(world / "unasked") == losses(world / "asked")
    assert not (world / "unasked/samples.jsonl").exists()


def test_documents_that_are_no_questions_are_continued(world):
    class Data:
        tokenizer, template, asks = object(), object(), False

    asked = TrainConfig(data_file="x", sample_prompt=("a",))
    assert Sampler.of(asked, Data()).template is None
    Data.tokenizer = None
    with pytest.raises(UserError, match="--tokenizer"):
        Sampler.of(asked, Data())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--sample_every 5", "--sample_every needs what to ask"),
        ("--val_first 1", "--val_first needs held-out data"),
        ("--sample_prompt a --strategy deepspeed_stage_3", "use deepspeed_stage_2"),
        ("--lr_init -2", "--lr_init must be at least 0, not -2"),
    ],
)
def test_what_cannot_be_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        TrainConfig.from_argv(["--data_file", "x", *flags.split()])


def test_each_epoch_has_a_line_with_its_losses(world, asked):
    said, folder = asked
    log = (folder / "train_log.txt").read_text().splitlines()[1:]
    held_out = [json.loads(line) for line in (folder / "val_data.jsonl").read_text().splitlines()]
    assert [h["step"] for h in held_out] == [0, 5, 10] and [h["epoch"] for h in held_out] == [0, 0, 1]
    for epoch, line in enumerate(log):
        loss, step, measured = float(line.split()[1]), 5 * (epoch + 1), held_out[epoch + 1]["loss"]
        assert f"epoch {epoch} ended with step {step}/10: loss {loss:.4f}, held out {measured:.4f}, in " in said


def test_the_loss_before_the_first_step_is_not_the_best(asked):
    _, folder = asked
    assert json.loads((folder / "rwkv-best.json").read_text())["step"] in (5, 10)


def test_only_the_newest_adapters_are_kept(world):
    train(world, "--epoch_count", 4, "--epoch_steps", 1, "--keep_adapters", 2, "--val_split", "0.2", name="kept")
    names = {path.name for path in (world / "kept").glob("rwkv-*")}
    assert names == {f"rwkv-{n}.{end}" for n in (2, 3, "best") for end in ("pth", "json")}


def test_an_adapter_that_the_run_began_with_is_kept(world):
    train(world, "--epoch_steps", 1, name="stages")
    more = ("--peft_checkpoint", world / "stages/rwkv-0.pth", "--epoch_begin", 1, "--epoch_count", 3, "--epoch_steps", 1)
    train(world, *more, "--keep_adapters", 1, "--overwrite", 1, name="stages")
    assert {path.name for path in (world / "stages").glob("rwkv-*.pth")} == {"rwkv-0.pth", "rwkv-3.pth"}


@pytest.mark.parametrize("broken", ["no login", "a folder of that name"])
def test_without_wandb_training_goes_on_after_a_line(world, broken, monkeypatch):
    def init(**_):
        raise RuntimeError("api_key not configured (no-tty).\nmore")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(**({"init": init} if broken == "no login" else {})))
    said = train(world, "--wandb", "mine", "--epoch_steps", 1, name=broken)
    assert said.count("warning: --wandb: ") == 1 and "logging goes on without" in said and "done " in said


# ---------------------------------------------------------------- at the end


def test_the_summary_holds_what_the_logs_hold(asked):
    said, folder = asked
    course = Course.of(folder, TrainConfig(data_file="x"))
    loss, trained = ([line[name] for line in course.steps] for name in ("loss", "trained"))
    assert (course.first, course.last) == first_and_last(loss, trained) == (pytest.approx(loss[0]), pytest.approx(loss[-1]))
    assert f"loss       {course.first:.4f} at first, {course.last:.4f} at the end; held out {course.held_out[0].loss:.4f}" in said
    assert f"tokens     {course.tokens:,} read, {sum(trained):,} of them trained" in said and "; peak memory " in said
    before, after = (f"\n  {when}" for when in ("before ", "after  "))
    assert said.count(before) == said.count(after) == 2 and "\nsample     What is 3 and 3?\n" in said


def test_the_next_commands_work_when_pasted(asked, tmp_path):
    said, _ = asked
    commands = said[said.index("next       ") + 11 :].splitlines()
    assert len(commands) == 2
    for command in commands:
        words = shlex.split(command.strip().replace("merge.py", str(ROOT / "merge.py")))
        assert words[0] == "python"
        done = program(words[1:], tmp_path)
        assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_lines_fit_a_hundred_columns(asked):
    said, _ = asked
    long = [line for line in said.splitlines() if len(line) > 100]
    assert [line for line in long if line[11:].split()[0] != "python" and max(map(len, line.split())) < 60] == []


HELD = [Held(0, 0, 3.0), Held(10, 0, 2.0), Held(20, 1, 1.5), Held(30, 2, 1.6), Held(40, 3, 2.0)]


@pytest.mark.parametrize(
    ("losses", "held_out", "said"),
    [
        ((3.0, 2.0), [], ""),
        ((3.0, 2.95), [], "the loss hardly fell, from 3.0000 to 2.9500"),
        ((3.0, 3.2), [], "the loss rose from 3.0000 to 3.2000"),
        ((3.0, 9.0), HELD[:3], "diverged"),
        ((3.0, 1.0), HELD[:3], ""),
        ((3.0, 2.99), HELD[:3], ""),  # what was held out tells it
        ((3.0, 1.0), HELD, "overfitted from epoch 2 on: the held-out loss was 1.5000 after step 20 and is 2.0000 now"),
        ((3.0, 1.0), [Held(0, 0, 2.0), Held(9, 0, 2.5)], "the held-out loss rose from 2.0000 to 2.5000"),
        ((3.0, 1.0), [Held(0, 0, 2.0), Held(9, 0, 1.99)], "the held-out loss hardly fell, from 2.0000 to 1.9900"),
        ((3.0, 1.0), [Held(9, 0, 2.0)], ""),
        ((math.nan, math.nan), [], ""),
    ],
)
def test_what_is_off_is_said_in_a_line_and_nothing_else_is(losses, held_out, said):
    line = verdict(losses, held_out)
    assert line.startswith(said) and bool(line) == bool(said) and "\n" not in line


def test_a_run_of_too_few_steps_that_hardly_moved_is_told_sooner():
    assert verdict((5.15, 4.81), []) == "" and "hardly fell" in verdict((5.15, 4.81), [], enough=False)
