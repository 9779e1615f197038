"""Another objective and other optimisers are one registered entry each: the run, its logs, resume and files need no change."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from rwkv_bone.errors import UserError
from rwkv_bone.files.adapters import load_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import open_tensors
from rwkv_bone.training import loop, optimiser
from rwkv_bone.training.loader import TrainingData
from rwkv_bone.training.objectives import OBJECTIVES, Objective
from rwkv_bone.training.optimiser import OPTIMISERS, Entry
from rwkv_bone.training.run import main
from tests.runs import arguments, assert_same_run, lines, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base model, texts, and pairs of a good and a bad answer: good ones end in a, bad ones in b."""
    folder = make_world(tmp_path_factory.mktemp("seam"), version="x060")  # whose weights SGD moves by less than bf16 resolves
    pairs = [{"ask": f"{i} is ", "good": "a" * (1 + i % 3), "bad": "b" * (1 + i % 2)} for i in range(12)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def train(folder, *flags, name):
    assert main(arguments(folder, *flags, name=name)) == 0
    return folder / name


def back_to(run, step):
    """Leave a run as if it had been killed after that step's checkpoint."""
    later = [path for path in (run / "checkpoints").iterdir() if int(path.stem.split("-")[1]) > step]
    assert later
    for path in [*later, *run.glob("rwkv-*")]:
        path.unlink()


# ---------------------------------------------------------------- an objective


class Pairs:
    """Samples of (prompt and good answer, prompt and bad answer, length of the prompt), as bytes."""

    def __init__(self, path):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        self.rows = [((r["ask"] + r["good"]).encode(), (r["ask"] + r["bad"]).encode(), len(r["ask"])) for r in rows]
        self.lengths = np.array([max(len(good), len(bad)) for good, bad, _ in self.rows])
        self.trained = np.ones(len(rows), np.int64)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i] if i >= 0 else None  # EMPTY: a row without content


def collate(rows):
    """The good answers, then the bad ones: idx and targets (2 n, T)."""
    rows = [row for row in rows if row is not None]
    texts = [(row[side], row[2]) for side in (0, 1) for row in rows]
    T = max((len(text) for text, _ in texts), default=2) - 1
    idx, targets = torch.zeros(max(len(texts), 2), T, dtype=torch.long), torch.full((max(len(texts), 2), T), -100)
    for i, (text, asked) in enumerate(texts):
        tokens = torch.tensor(list(text))
        idx[i, : len(text) - 1] = tokens[:-1]
        targets[i, asked - 1 : len(text) - 1] = tokens[asked:]
    tokens = torch.tensor(sum(len(text) - 1 for text, _ in texts))
    return {"idx": idx, "targets": targets, "pairs": torch.tensor(len(rows)), "tokens": tokens}


def margins(model, micro):
    """How much more probable each good answer is than its bad one: difference of log probabilities (n,)."""
    logits = model(micro["idx"])[0].float()
    each = -F.cross_entropy(logits.transpose(1, 2), micro["targets"], ignore_index=-100, reduction="none").sum(1)
    good, bad = each.chunk(2)
    return good - bad


class Margin(Objective):
    def open_data(self, model):
        return TrainingData(self.config, Pairs(Path(self.config.data_file)), collate)

    def count(self, micro):
        return micro["pairs"]

    def loss(self, model, micro, state=None):
        return -F.logsigmoid(margins(model, micro)).sum() * (micro["pairs"] > 0), None


@pytest.fixture
def margin(monkeypatch):
    monkeypatch.setitem(OBJECTIVES, "margin", Margin)


def flags_for(world):
    return ("--objective", "margin", "--data_file", world / "pairs.jsonl")


@pytest.mark.usefixtures("margin")
def test_an_objective_with_samples_of_its_own_is_learned(world):
    out = train(world, *flags_for(world), "--epoch_count", 6, name="margin")
    base, tuned = load_model(world / "base.pth", torch.float32), load_model(world / "base.pth", torch.float32)
    load_adapter(tuned, out / "rwkv-5.pth")
    micro = collate(Pairs(world / "pairs.jsonl").rows)
    with torch.no_grad():
        before, after = margins(base, micro), margins(tuned, micro)
    assert (after > before).all() and after.mean() > before.mean() + 1
    assert len(lines(out)) == 18  # 12 pairs, 4 a step, 6 times


@pytest.mark.usefixtures("margin")
def test_the_logged_loss_is_the_mean_over_the_objectives_count(world):
    out = train(world, *flags_for(world), "--micro_bsz", 12, name="one-step")
    micro = collate(Pairs(world / "pairs.jsonl").rows)
    with torch.no_grad():
        expected = -F.logsigmoid(margins(load_model(world / "base.pth", torch.float32), micro)).mean()
    assert [line["loss"] for line in lines(out)] == pytest.approx([expected.item()], rel=1e-5)


@pytest.mark.usefixtures("margin")
def test_micro_batches_weigh_by_the_objectives_own_count(world):
    whole = train(world, *flags_for(world), "--micro_bsz", 5, name="whole")
    parts = train(world, *flags_for(world), "--micro_bsz", 1, "--accumulate_grad_batches", 5, name="parts")
    a, b = ([line["loss"] for line in lines(run)] for run in (whole, parts))
    assert len(a) == len(b) == 3 and a == pytest.approx(b, rel=1e-4)


@pytest.mark.usefixtures("margin")
def test_an_objective_is_resumed_bitwise(world):
    whole = train(world, *flags_for(world), "--epoch_count", 2, name="unbroken")
    again = train(world, *flags_for(world), "--epoch_count", 2, "--save_every_steps", 1, "--keep_last", 9, name="broken")
    back_to(again, 2)
    train(world, *flags_for(world), "--epoch_count", 2, "--resume", "auto", name="broken")
    assert_same_run(whole, again)


@pytest.mark.usefixtures("margin")
def test_what_an_objective_does_not_have_is_refused(world):
    with pytest.raises(UserError, match="margin"):
        main(arguments(world, *flags_for(world), "--train_type", "infctx", name="refused"))
    assert not (world / "refused").exists()


# ---------------------------------------------------------------- optimisers

OTHERS = {  # entry, learning rate for an adapter; Adafactor's is relative to a tensor's size, and Bone begins at 0
    "sgd": (Entry(lambda groups, config: torch.optim.SGD(groups, lr=config.lr_init, momentum=0.9), 4), 1.0),
    "adafactor": (Entry(lambda groups, config: torch.optim.Adafactor(groups, lr=config.lr_init), 4), 1.0),
}


@pytest.fixture
def others(monkeypatch):
    for name, (entry, _) in OTHERS.items():
        monkeypatch.setitem(OPTIMISERS, name, entry)


@pytest.mark.usefixtures("others")
@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("more", [(), ("--peft", "none", "--precision", "bf16")], ids=["bone", "full"])
def test_another_optimiser_trains(world, name, more):
    rate = OTHERS[name][1] / (20 if more else 1)
    out = train(world, "--optim", name, "--lr_init", rate, "--epoch_count", 4, *more, name=f"{name}-{len(more)}")
    losses = [line["loss"] for line in lines(out)]
    assert np.mean(losses[-6:]) < 0.95 * np.mean(losses[:6])


@pytest.mark.usefixtures("others")
def test_another_optimiser_is_resumed_bitwise_masters_too(world):
    more = ("--optim", "sgd", "--peft", "none", "--precision", "bf16", "--lr_init", 0.1)
    whole = train(world, *more, name="sgd-unbroken")
    broken = train(world, *more, "--save_every_steps", 1, "--keep_last", 9, name="sgd-broken")
    back_to(broken, 3)
    train(world, *more, "--resume", "auto", name="sgd-broken")
    assert_same_run(whole, broken)


@pytest.mark.usefixtures("others")
def test_steps_of_another_optimiser_below_the_resolution_of_bf16_are_not_lost(world, monkeypatch):
    """The same run in bf16 alone leaves most weights where they were."""
    more = ("--optim", "sgd", "--peft", "none", "--precision", "bf16", "--lr_init", 3e-4, "--epoch_count", 4, "--grad_clip", 0)
    base = open_tensors(world / "base.pth")

    def moved(run):
        tuned = open_tensors(run / "rwkv-3.pth")
        return sum(int((tuned[name] != base[name]).sum()) for name in base)

    with_masters = moved(train(world, *more, name="masters"))
    monkeypatch.setattr(loop, "make_optimiser", lambda model, config, masters: optimiser.make_optimiser(model, config, False))
    assert with_masters > 2 * moved(train(world, *more, name="bf16-alone")) > 0


# ---------------------------------------------------------------- names


@pytest.mark.parametrize(("flag", "known"), [("--objective", "text"), ("--optim", "adamw")])
def test_an_unknown_name_is_refused_in_one_line(world, flag, known):
    with pytest.raises(UserError, match=rf"{flag} nonsense.*{known}") as refused:
        main(arguments(world, flag, "nonsense", name="unknown"))
    assert "\n" not in str(refused.value)
    assert not (world / "unknown").exists()
