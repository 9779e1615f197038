"""The comparison: equal budgets, the sweep's search, runs that are train.py's own, and going on after any end."""

import json
import math
import os
import random
import statistics
from collections import Counter
from dataclasses import replace

import pytest
import torch

from rwkv_bone.compare import command as compare
from rwkv_bone.compare import one_run
from rwkv_bone.compare.comparison import Comparison, Entry, Run
from rwkv_bone.compare.report import apart, markdown, smooth
from rwkv_bone.compare.report import rows as table_rows
from rwkv_bone.compare.study import Study
from rwkv_bone.compare.sweep import match_r, next_rate, projection_shapes, to_do, trained_parameters
from rwkv_bone.data.documents import open_documents
from rwkv_bone.data.tokenizer import ByteTokenizer, open_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.files.adapters import load_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.peft import METHODS, inject
from tests.conftest import small_model
from tests.fuzz import altered, written
from tests.runs import make_world

SHAPES = Counter({(16, 24): 8, (24, 16): 2, (40, 24): 2, (24, 40): 2, (24, 24): 2})


# -------------------------------------------------- budgets


def test_bone_and_lora_of_half_the_r_train_equally_much_on_square_weights():
    square = {(64, 64): 5}
    budget = trained_parameters(square, "bone", {"r": 16})
    assert budget == 5 * 64 * 16
    assert match_r(square, "lora", {}, budget) == 8
    assert match_r(square, "miss", {}, budget) == 16


@pytest.mark.parametrize("method", METHODS)
def test_no_other_r_is_nearer_to_the_budget(method):
    def distance(r):
        return abs(trained_parameters(SHAPES, method, {"r": r}) - 3000)

    r = match_r(SHAPES, method, {}, 3000)
    others = range(1, 8 if method == "lora_ga" else 16)
    assert distance(r) == min(map(distance, others)) and r == min(k for k in others if distance(k) == distance(r))


@pytest.mark.parametrize("method", METHODS)
def test_counted_is_what_a_model_with_the_method_trains(method):
    model = small_model(dtype=torch.float32)
    shapes = projection_shapes(model, ("att", "ffn.key"))
    layer = METHODS[method]
    inject(model, layer, layer.Config(3), ("att", "ffn.key"))
    assert trained_parameters(shapes, method, {"r": 3}) == sum(p.numel() for p in model.parameters() if p.requires_grad)


# -------------------------------------------------- the sweep


def search(best: float, lrs=(1e-3, 3e-3, 1e-2), extend=3, refine=0, seeds=(4, 5, 6), diverges_above=math.inf) -> list[Run]:
    """All runs that are made where the loss is least at the rate `best`, in order, one at a time."""
    entry, made = Entry("m", "lora", (), lrs, 0), {}
    while waiting := to_do([entry], seeds, extend, refine, made):
        run = waiting[0]
        made[run] = math.inf if run.lr > diverges_above else math.log(run.lr / best) ** 2
        assert len(made) < 50
    return list(made)


def test_a_best_rate_inside_the_grid_is_taken():
    assert [(run.lr, run.seed) for run in search(3e-3)] == [(1e-3, 4), (3e-3, 4), (1e-2, 4), (3e-3, 5), (3e-3, 6)]


@pytest.mark.parametrize("best, tried", [(3e-2, {1e-3, 3e-3, 1e-2, 3e-2, 1e-1}), (1e-3, {1e-3, 3e-3, 1e-2, 3e-4})])
def test_the_grid_grows_until_the_best_rate_has_neighbours(best, tried):
    runs = search(best)
    assert {run.lr for run in runs} == tried and {run.seed for run in runs if run.lr == best} == {4, 5, 6}
    assert len(runs) == len(tried) + 2


def test_the_grid_grows_no_further_than_allowed():
    runs = search(1e3, extend=2)
    assert sorted({run.lr for run in runs}) == [1e-3, 3e-3, 1e-2, 3e-2, 1e-1]
    assert {run.lr for run in runs if run.seed == 6} == {1e-1}


def test_a_rate_between_those_of_the_grid_is_found_and_taken():
    runs = search(1.7e-3, refine=1)
    assert [run.lr for run in runs if run.seed == 4] == [1e-3, 3e-3, 1e-2, 3e-4, 1.7e-3]
    assert [run.lr for run in runs if run.seed == 6] == [1.7e-3]


def test_a_rate_that_is_as_good_as_tried_is_not_refined():
    assert search(3.1e-3, refine=2) == search(3.1e-3)


def test_where_all_rates_diverge_smaller_ones_are_tried():
    assert {run.lr for run in search(1e-4, diverges_above=5e-4) if run.seed == 5} == {1e-4}


def test_next_rates_are_round_and_apart():
    assert [next_rate(x, True) for x in (1e-3, 2e-3, 3e-3, 5e-2)] == [3e-3, 1e-2, 1e-2, 1e-1]
    assert [next_rate(x, False) for x in (1e-3, 2e-3, 3e-3, 5e-2)] == [3e-4, 1e-3, 1e-3, 3e-2]


def test_all_sweeps_come_before_the_other_seeds_and_each_seed_before_the_next():
    entries = [Entry(name, "lora", (), (1e-3,), 0) for name in "ab"]
    made = {}
    while waiting := to_do(entries, (0, 1, 2), 0, 0, made):
        made[waiting[0]] = 1.0
    assert [(run.entry.label, run.seed) for run in made] == [(name, seed) for seed in range(3) for name in "ab"]


# -------------------------------------------------- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("compare"))
    held_out = [{"text": f"{i} and {i} is {2 * i}."} for i in range(40, 45)]
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    return folder


def write(folder, name: str = "config.json", **more):
    given = {
        "load_model": str(folder / "base.pth"),
        "data_file": str(folder / "data.jsonl"),
        "held_out": str(folder / "held_out.jsonl"),
        "held_out_documents": 4,
        "ctx_len": 32,
        "micro_bsz": 4,
        "accelerator": "cpu",
        "threads": 1,
        "steps": 2,
        "lrs": [1e-3, 1e-2],
        "extend": 0,
        "refine": 0,
        "seeds": [3, 7],
        "methods": {"bone": {"r": 4}, "lora": {}},
        **more,
    }
    (folder / name).write_text(json.dumps({k: v for k, v in given.items() if v is not None}))
    return folder / name


def records(out) -> list[dict]:
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def done(world):
    compare.main([str(write(world, workers=2)), "--out", str(world / "out")])
    return world / "out"


def test_every_rate_runs_once_and_the_best_with_every_seed(done):
    for method in ("bone", "lora"):
        runs = [r for r in records(done) if r["method"] == method]
        assert len(runs) == 3 and {r["lr"] for r in runs} == {1e-3, 1e-2}
        first = {r["lr"]: r["choosing_loss"] for r in runs if r["seed"] == 3}
        assert [r["lr"] for r in runs if r["seed"] == 7] == [min(first, key=first.get)]
    assert len({r["trained"] for r in records(done) if r["method"] != "base"}) == 1


def test_the_table_says_what_the_runs_found(done):
    lines = (done / "table.md").read_text().splitlines()
    assert lines[-1].startswith("| base, untrained |")
    for method in ("bone", "lora"):
        runs = [r for r in records(done) if r["method"] == method]
        best = next(r["lr"] for r in runs if r["seed"] == 7)
        losses = [r["held_out_loss"] for r in runs if r["lr"] == best]
        (line,) = [line for line in lines if line.startswith(f"| {method} |")]
        assert f"{statistics.fmean(losses):.4f} ± {statistics.stdev(losses):.4f}" in line
        assert f"{runs[0]['trained']:,}" in line and f"| {best:g} |" in line
    assert len((done / "curves.csv").read_text().splitlines()) == 1 + 8 * 2
    assert (done / "curves.png").stat().st_size > 10_000
    assert not any((done / "running").iterdir())


def test_all_methods_meet_the_same_batches(done):
    """A fresh adapter computes what the base does: the first step's loss is the untrained model's on the first batch."""
    base = {r["seed"]: r["losses"] for r in records(done) if r["method"] == "base"}
    assert base[3] != base[7]
    for r in records(done):
        assert r["losses"][0] == pytest.approx(base[r["seed"]][0], abs=1e-5)


def test_a_run_is_what_train_py_makes_with_the_same_flags(world, done):
    from rwkv_bone.training.run import main

    record = next(r for r in records(done) if (r["method"], r["lr"], r["seed"]) == ("lora", 1e-2, 3))
    flags = {"load_model": world / "base.pth", "data_file": world / "data.jsonl", "ctx_len": 32, "micro_bsz": 4, "peft": "lora",
             "r": record["options"]["r"], "lr_init": 1e-2, "random_seed": 3, "epoch_steps": 2, "accelerator": "cpu",
             "threads": 1, "proj_dir": world / "alone"}  # fmt: skip
    assert main([str(word) for name, value in flags.items() for word in (f"--{name}", value)]) == 0
    alone = [json.loads(line)["loss"] for line in (world / "alone" / "loss_data.jsonl").read_text().splitlines()]
    assert alone == record["losses"]
    model = load_model(world / "base.pth", torch.float32)
    load_adapter(model, world / "alone" / "rwkv-0.pth")
    documents = open_documents(world / "held_out.jsonl", tokenizer=ByteTokenizer(257))
    for name, ids in (("choosing_loss", (0, 2)), ("held_out_loss", (1, 3))):
        nll = []
        for i in ids:
            tokens = torch.from_numpy(documents[i][0])[None]
            with torch.no_grad():
                nll.append(torch.nn.functional.cross_entropy(model(tokens)[0][0, :-1], tokens[0, 1:], reduction="none"))
        assert record[name] == pytest.approx(torch.cat(nll).mean().item(), rel=1e-5)


def test_curves_are_compared_seed_by_seed():
    ours = [{"seed": 2, "losses": [3.0, 2.0]}, {"seed": 1, "losses": [4.0, 5.0]}, {"seed": 9, "losses": [0.0, 0.0]}]
    others = [{"seed": 1, "losses": [1.0, 1.0]}, {"seed": 2, "losses": [2.0, 2.0]}]
    assert apart(ours, others) == [2.0, 2.0]
    assert smooth([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


# -------------------------------------------------- going on


def copy(done, folder):
    folder.mkdir()
    (folder / "runs.jsonl").write_bytes((done / "runs.jsonl").read_bytes())
    return folder


def test_what_is_done_is_not_done_again(world, done, tmp_path, capsys):
    out = copy(done, tmp_path / "out")
    compare.main([str(write(world)), "--out", str(out)])
    assert (out / "runs.jsonl").read_bytes() == (done / "runs.jsonl").read_bytes()
    assert (out / "table.md").read_text() == (done / "table.md").read_text()
    assert "8 runs are done, 0 or more" in capsys.readouterr().out


def test_a_record_that_was_cut_off_costs_that_run_alone(world, done, tmp_path):
    out = copy(done, tmp_path / "out")
    whole = (out / "runs.jsonl").read_bytes()
    (out / "runs.jsonl").write_bytes(whole[:-9])
    compare.main([str(write(world)), "--out", str(out)])
    again = (out / "runs.jsonl").read_bytes()
    kept = whole.rstrip(b"\n").rfind(b"\n") + 1
    assert again[:kept] == whole[:kept]
    old, new = json.loads(whole[kept:]), json.loads(again[kept:])
    assert old["losses"] == new["losses"] and old["held_out_loss"] == new["held_out_loss"]


def test_another_seed_costs_one_run_for_each_row_of_the_table(world, done, tmp_path):
    out = copy(done, tmp_path / "out")
    compare.main([str(write(world, seeds=[3, 7, 9])), "--out", str(out)])
    assert sorted((r["method"], r["seed"]) for r in records(out)[8:]) == [("base", 9), ("bone", 9), ("lora", 9)]


def test_other_steps_or_data_are_other_runs(world, done, tmp_path):
    comparison = Comparison.read(write(world))
    out = copy(done, tmp_path / "out")
    assert len(Study(comparison, out).results()) == 8
    (tmp_path / "other.jsonl").write_text('{"text": "something else"}\n' * 9)
    for changed in (replace(comparison, steps=3), replace(comparison, held_out_every=2),
                    replace(comparison, flags={**comparison.flags, "ctx_len": 16}),
                    replace(comparison, held_out=str(tmp_path / "other.jsonl"))):  # fmt: skip
        assert not Study(changed, out).results()
    moved = replace(comparison, flags={**comparison.flags, "threads": 2})
    assert len(Study(moved, out).results()) == 8


def test_held_out_documents_are_spread_over_the_file_if_wanted(world, tmp_path):
    comparison = Comparison.read(write(world, held_out_every=2, held_out_documents=2))
    assert list(Study(comparison, tmp_path).held_out_ids) == [0, 2]
    assert list(Study(replace(comparison, held_out_documents=9), tmp_path).held_out_ids) == [0, 2, 4]


def test_rows_are_read_as_train_py_reads_them(world, tmp_path):
    """The template is the model's or the configuration's; fields and rows are those asked for."""
    rows = [{"problem": f"{i}?", "solution": "one\n\ntwo"} for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = {"data_file": str(tmp_path / "pairs.jsonl"), "data_rows": ":6"}
    asked["fields"] = {"question": "problem", "answer": "solution"}

    def first(**more):
        documents = Study(Comparison.read(write(world, "rows.json", **asked, **more)), tmp_path).documents
        assert len(documents) == 6
        return open_tokenizer("auto", 257).decode(documents[0][0].tolist()[:-1])

    assert first() == first(template="g1") == "User: 0?\n\nAssistant: one\n\ntwo"
    assert first(template="world") == "User: 0?\n\nAssistant: one\ntwo"  # a blank line would end the turn


def dies(answer, *rest):
    os._exit(9)


def test_a_run_that_dies_is_told_and_the_others_are_kept(world, done, tmp_path, monkeypatch):
    out = copy(done, tmp_path / "out")
    monkeypatch.setattr(one_run, "child", dies)
    with pytest.raises(UserError, match=r"lora, lr 0.1, seed 3: its process ended with code 9"):
        compare.main([str(write(world, methods={"bone": {"r": 4}, "lora": {"lrs": [1e-3, 1e-2, 1e-1]}})), "--out", str(out)])
    assert (out / "runs.jsonl").read_bytes() == (done / "runs.jsonl").read_bytes()


def test_a_rate_that_diverges_is_recorded_and_not_chosen(world, tmp_path):
    methods = {"lora": {"r": 2, "lrs": [1e-3, 1e30]}, "none": {}}
    config = write(world, "diverges.json", methods=methods, lrs=[1e-3], seeds=[0], budget="lora")
    compare.main([str(config), "--out", str(tmp_path)])
    found = {(r["method"], r["lr"]): r for r in records(tmp_path)}
    assert "step 2: loss" in found["lora", 1e30]["diverged"] and found["lora", 1e30]["held_out_loss"] == math.inf
    table = (tmp_path / "table.md").read_text()
    assert "1e+30" not in table and "| none: all parameters |" in table


def test_one_rate_for_all_state_tuning_forgetting_and_what_was_trained(world, tmp_path):
    """A table at one rate; state tuning; the loss on other text, as evaluate has it; files that are kept."""
    (tmp_path / "general.jsonl").write_text("".join(json.dumps({"text": f"A line of {n} words. " * 3}) + "\n" for n in range(3)))
    methods = {"lora": {"r": 2, "lrs": [1e-2]}, "state": {"lrs": [1e-1]}, "none": {"lrs": [1e-3]}}
    config = write(world, "more.json", methods=methods, seeds=[0], budget="lora", keep=True, one_rate=3e-3,
                   general=str(tmp_path / "general.jsonl"), general_documents=2)  # fmt: skip
    compare.main([str(config), "--out", str(tmp_path / "out")])
    found = {(r["method"], r["lr"]): r for r in records(tmp_path / "out")}
    assert {*found} == {("base", 0), ("lora", 1e-2), ("lora", 3e-3), ("state", 1e-1), ("none", 1e-3)}
    model = load_model(world / "base.pth", torch.float32)
    state = [name for name in model.add_initial_state()]
    assert found["state", 1e-1]["trained"] == sum(model.get_parameter(name).numel() for name in state)

    documents = open_documents(tmp_path / "general.jsonl", tokenizer=ByteTokenizer(257))

    def general(model):
        with torch.no_grad():
            rows = [torch.from_numpy(documents[i][0])[None] for i in (0, 1)]
            return torch.cat([torch.nn.functional.cross_entropy(model(x)[0][0, :-1], x[0, 1:], reduction="none") for x in rows])

    base = load_model(world / "base.pth", torch.float32)
    tuned = load_model(world / "base.pth", torch.float32)
    load_adapter(tuned, tmp_path / "out" / "trained" / "lora-0.01-0" / "rwkv-0.pth")
    losses = [general(m).mean().item() for m in (base, tuned)]
    assert [found["base", 0]["general_loss"], found["lora", 1e-2]["general_loss"]] == pytest.approx(losses, rel=1e-5)
    best, one = (tmp_path / "out" / "table.md").read_text().split("All at the rate 0.003:")
    assert f"{losses[1] - losses[0]:+.4f}" in best and "| lora | 2 |" in one and "state: initial states" not in one


# -------------------------------------------------- bad configs


@pytest.mark.parametrize(
    "more, message",
    [
        ({"step": 3}, "step is neither a flag of train.py nor one of"),
        ({"lr_init": 1e-3}, "lr_init is set by the comparison"),
        ({"held_out": None}, "held_out is missing"),
        ({"steps": 0}, "steps must be a whole number, at least 1, not 0"),
        ({"seeds": [1, 1]}, "different whole numbers"),
        ({"methods": {"bnoe": {}}}, "bnoe is no method"),
        ({"methods": {"none": {"r": 3}}}, "has no option r"),
        ({"methods": {"state": {"r": 3}}}, "has no option r"),
        ({"methods": {"state": {}}, "dataload": "pack"}, "--train_type state: where rows are packed"),
        ({"one_rate": -1}, "one_rate must be a rate, or 0"),
        ({"general": 3}, "general must be the name of data"),
        ({"methods": {"bone": {"r": 4, "alpha": 2.0}}}, "no option alpha"),
        ({"methods": {"lora": {}}}, "budget: bone is no adapter"),
        ({"held_out_documents": 1}, "at least 2"),
    ],
)
def test_a_bad_config_is_told_in_one_line(world, tmp_path, more, message):
    with pytest.raises(UserError, match=message) as error:
        compare.main([str(write(world, "bad.json", **more)), "--out", str(tmp_path / "out")])
    assert "\n" not in str(error.value)


def test_whatever_runs_jsonl_holds_it_is_read_or_its_line_is_named(world, done, tmp_path):
    comparison, rows, choose, read = Comparison.read(write(world)), records(done), random.Random(1), 0
    study = Study(comparison, tmp_path / "out")
    for _ in range(120):
        number = choose.randrange(len(rows))
        changed = [altered(choose, row) if i == number else row for i, row in enumerate(rows)]
        study.file.write_bytes(b"".join(written(row) + b"\n" for row in changed))
        try:
            study.done = study.read()
            assert study.describe() and markdown(table_rows(study), study.reference, True)
            read += 1
        except UserError as error:
            assert f"line {number + 1} is damaged" in str(error)
    assert 5 < read < 100
