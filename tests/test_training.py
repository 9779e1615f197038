"""train.py as a user runs it: what it says, what it writes, that it learns, and refuses bad input."""

import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rwkv_bone.config import TrainConfig
from rwkv_bone.data.binidx import BinidxWriter
from rwkv_bone.data.samples import BatchSampler
from rwkv_bone.errors import UserError, run
from rwkv_bone.files.adapters import load_adapter, read_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import open_tensors, save_tensors
from rwkv_bone.generate import command as generate
from rwkv_bone.ops.float32 import onednn_is_right
from rwkv_bone.ops.wkv7 import cpu as wkv7_cpu
from rwkv_bone.plot import read_run
from rwkv_bone.training.loader import TrainingData
from rwkv_bone.training.logs import Logs, StepRecord, say
from rwkv_bone.training.outputs import RunFolder
from rwkv_bone.training.run import main
from tests.conftest import each_version
from tests.independent import rwkv_package
from tests.runs import ROOT, arguments, losses, make_world, run_to_end


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("train"))


def train(folder: Path, *flags, name: str = "run", **more) -> str:
    """Run to the end; what it said."""
    ended = run_to_end(folder, *flags, name=name, **more)
    assert ended.codes == [0], ended.said
    return ended.said


@pytest.fixture(scope="module")
def finished(world):
    return train(world, "--epoch_count", 3, picture=True)


@pytest.mark.parametrize("peft", ["bone", "none"])
def test_a_run_does_not_import_torchs_compiler(peft, world):
    """It takes longer to import than torch itself. `none`: with masters of bf16 weights, and resumed."""
    code = (
        "import sys; from rwkv_bone.training.run import main; main(sys.argv[1:]);"
        "print(sorted({'torch._dynamo', 'torch._inductor', 'sympy', 'lightning', 'deepspeed'} & {*sys.modules}))"
    )
    for more in (["--epoch_count", 1], ["--epoch_count", 2, "--resume", "auto"]):
        flags = ["--peft", peft, "--epoch_steps", 2, "--op", "cpu", "--precision", "bf16", *more]
        argv = [sys.executable, "-c", code, *arguments(world, *flags, name=f"imports {peft}")]
        done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout[-2000:] + done.stderr


def test_before_the_first_step_all_that_matters_is_printed(world, finished):
    out = finished
    base_size = sum(p.numel() for p in load_model(world / "base.pth").parameters())
    for text in (
        f", {base_size:,} parameters",
        "2 layers, n_embd 32",
        "24 documents",
        "data       tokenizer: bytes of utf-8\n",
        "18 = 3 epochs of 6",
        "bone: W'_ij = W_ij + W_ij B_j + B_j; r=8",
        "att.key",
        "ffn.value",
        "fp32",
        "memory",
        "rwkv-2.pth at the end, and before it one after every epoch; checkpoints",
    ):
        assert " ".join(text.split()) in " ".join(out.split()), out
    assert "\r" not in out and "\x1b" not in out  # not a terminal: no control codes


def test_a_first_loss_above_that_of_guessing_is_warned_of_once(world, finished):
    folder = world / "surely wrong"
    folder.mkdir()
    tensors = open_tensors(world / "base.pth")
    save_tensors(folder / "base.pth", {n: t * (100 if n == "head.weight" else 1) for n, t in tensors.items()})
    (folder / "data.jsonl").write_text((world / "data.jsonl").read_text())
    said = train(folder, "--lr_init", "1e-4", "--epoch_steps", 2)
    first = json.loads((folder / "run/loss_data.jsonl").read_text().splitlines()[0])["loss"]
    assert first > 1.1 * math.log(257)
    assert said.count(f"warning: the first loss, {first:.2f}, is above that of guessing, 5.55: was the model trained") == 1
    assert "rwkv-0.pth; checkpoints" in said and "above that of guessing" not in finished


def test_on_a_terminal_what_is_said_stands_on_a_line_of_its_own_above_the_bar(monkeypatch, tmp_path):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    logs = Logs(RunFolder(tmp_path), TrainConfig(data_file="-"), 0, 2, None)
    logs.step(StepRecord(step=1, epoch=0, loss=1.0, lr=1e-3, grad_norm=1.0, trained=8, tokens=8, seconds=1.0))
    logs.bar.refresh()
    say("validation: 1.5")
    logs.close()
    rows = [line.split("\r")[-1] for line in terminal.getvalue().split("\n")]
    assert "loss 1.0" in terminal.getvalue() and "validation: 1.5" in rows, rows


def test_without_the_packages_the_programs_say_so_in_a_line():
    for program in ("train.py", "merge.py"):
        path = Path(__file__).parents[1] / program
        bare = subprocess.run([sys.executable, "-S", path, "--help"], capture_output=True, text=True)  # no site-packages
        assert bare.returncode == 2 and re.fullmatch("error: no package .+\n", bare.stderr)


def test_the_device_line_names_what_was_chosen(world):
    def line(*flags) -> str:
        (found,) = [line for line in train(world, "--dry_run", *flags, name="dry").splitlines() if line.startswith("device ")]
        return found

    assert line().endswith(f"fp32, engine: one process, WKV7: C++ kernel, {wkv7_cpu.variants[-1]}, 1 thread")
    assert line("--op", "torch").endswith("WKV7: chunked, in plain torch")
    many = line("--micro_bsz", 256)  # rows, of a token or more each
    assert ("fp32 by oneDNN, engine" if onednn_is_right() else "fp32, engine") in many
    assert "engine: ddp" in line("--devices", 2)


def test_the_last_lines_name_the_result_and_what_to_do_with_it(world):
    whole = train(world, "--peft", "none", "--epoch_steps", 1, name="model").splitlines()
    assert f"saved      {world}/model/rwkv-0.pth" in whole
    assert f"generate --model {world}/model/rwkv-0.pth" in whole[-1]
    state = train(world, "--train_type", "state", "--peft", "none", "--epoch_steps", 1, name="states").splitlines()
    assert f"merge.py --base_model {world}/base.pth --peft_checkpoint {world}/states/rwkv-0.pth" in state[-2]
    assert "method     state tuning: each layer's initial state trains" in state


@pytest.mark.parametrize("kind", ["bone", "quantised", "state", "none"])
def test_the_share_that_trains_is_of_base_and_adapter_together(world, kind):
    flags = {
        "bone": [],
        "quantised": ["--quant", "int8"],
        "state": ["--train_type", "state", "--peft", "none"],
        "none": ["--peft", "none"],
    }[kind]
    base = sum(p.numel() for p in load_model(world / "base.pth").parameters())
    adapter = 2 * (8 * 32 * 5 + 8 * 64)  # 2 layers, r = 8; five projections of 32 inputs, one of 64
    beside = {"state": 2 * 4 * 8 * 8, "none": 0}.get(kind, adapter)
    out = re.sub(r"\n {11}(?! )", " ", train(world, "--dry_run", *flags, name="dry"))  # lines are wrapped
    assert f", {base:,} parameters\n" in out
    if kind == "none":
        assert f"trains     {base:,} parameters, 100.00% of {base:,}" in out
        return
    share = f"{100 * beside / (base + beside):.2f}% of {base + beside:,}: {base:,} of the base and {beside:,} beside it"
    assert f"trains     {beside:,} parameters, {share}" in out


def test_the_loss_falls_and_every_file_is_there(world, finished):
    run = world / "run"
    seen = losses(run)
    assert [step for step, _ in seen] == list(range(1, 19))
    assert seen[-1][1] < 0.8 * seen[0][1]
    assert {f"rwkv-{n}.{kind}" for n in range(3) for kind in ("pth", "json")} <= {p.name for p in run.iterdir()}
    assert (run / "loss.png").read_bytes()[:4] == b"\x89PNG"
    header, *epochs = (run / "train_log.txt").read_text().splitlines()
    assert header.startswith("#") and [line.split()[0] for line in epochs] == ["0", "1", "2"]
    metrics = (run / "metrics.csv").read_text().splitlines()
    assert len(metrics) == 19 and "loss" in metrics[0]
    info = json.loads((run / "rwkv-2.json").read_text())
    assert (info["method"], info["options"], info["step"]) == ("bone", {"r": 8}, 18)


def test_base_and_adapter_files_are_the_tuned_model(world, finished):
    base, tuned = (load_model(world / "base.pth", torch.float32) for _ in range(2))
    load_adapter(tuned, world / "run" / "rwkv-2.pth")
    idx = torch.tensor([[1 + b for b in b"7 and 7 is 14. "]])
    with torch.no_grad():
        nll = [torch.nn.functional.cross_entropy(m(idx)[0][0, :-1], idx[0, 1:]).item() for m in (base, tuned)]
    assert nll[1] < 0.8 * nll[0]


@each_version
def test_a_new_model_trains_from_scratch(version, world):
    sizes = ("--my_testing", version, "--n_layer", 2, "--n_embd", 32, "--head_size_a", 8, "--vocab_size", 257)
    train(world, "--load_model", "", "--peft", "none", *sizes, "--epoch_count", 2, name=f"scratch {version}")
    seen = losses(world / f"scratch {version}")
    assert seen[-1][1] < seen[0][1]
    model = load_model(world / f"scratch {version}" / "rwkv-1.pth")
    assert (model.version, model.sizes.n_layer) == (version, 2)
    assert model.emb.weight.dtype == torch.bfloat16  # as every RWKV program wants it


def test_parts_of_the_base_train_beside_the_adapter(world):
    train(world, "--train_parts", "time", "ln", "--precision", "bf16", name="parts")
    tensors = open_tensors(world / "parts" / "rwkv-0.pth")
    assert tensors["blocks.1.att.w0"].dtype == torch.bfloat16
    base = open_tensors(world / "base.pth")
    for name in ("blocks.0.att.w0", "blocks.1.att.v1", "blocks.1.ln1.weight", "ln_out.bias"):
        assert not torch.equal(tensors[name], base[name]), name
    assert tensors["blocks.0.att.key.bone"].dtype == torch.float32


def test_accumulated_micro_batches_equal_one_large_batch(world):
    train(world, "--micro_bsz", 8, name="large")
    train(world, "--micro_bsz", 2, "--accumulate_grad_batches", 4, name="small")
    for (step, a), (_, b) in zip(losses(world / "large"), losses(world / "small"), strict=True):
        assert a == pytest.approx(b, abs=2e-5), step


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load_model", "none.pth"], "none.pth: no such file"),
        (["--load_model", "data.jsonl"], "data.jsonl: not a .pth"),
        (["--peft", "bone", "--my_testing", "x060"], "base.pth is RWKV-7 (x070); leave the flag out"),
        (["--n_layer", "3"], "--n_layer 3 contradicts"),
        (["--vocab_size", "65536"], "--vocab_size 65536 contradicts"),
        (["--load_model", ""], "--peft bone needs a base model"),
        (["--data_file", "none.jsonl"], "none.jsonl"),
        (["--data_file", "broken.jsonl"], "line 2"),
        (["--data_file", "empty.jsonl"], "empty.jsonl"),
        (["--data_type", "binidx", "--data_file", "none"], "none"),
        (["--parts", "attn"], "--parts attn"),
        (["--train_parts", "tme"], "--train_parts"),
        (["--accelerator", "gpu"], "sees no GPU"),
        (["--op", "cuda"], "--op cuda is no kernel for this run, which is on cpu"),
        (["--strategy", "deepspeed_stage_2"], "--strategy deepspeed_stage_2 needs a GPU"),
        (["--proj_dir", "base.pth/x"], "--proj_dir"),
        (["--lr_init", "1e30", "--grad_clip", "0", "--epoch_count", "3"], "--overwrite"),
        (["--lr_init", "1e30", "--grad_clip", "0", "--save_every_steps", "1"], "--resume auto"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(world, flags, message, capsys, monkeypatch):
    (world / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    (world / "empty.jsonl").write_text("")
    if "gpu" in flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    monkeypatch.chdir(world)
    with pytest.raises(SystemExit) as ended:
        run(lambda: main(arguments(world, *flags, name="bad" + str(abs(hash(tuple(flags)))))))
    said = capsys.readouterr().err
    assert ended.value.code == 2 and message in said
    assert said.count("\n") == 1 and said.startswith("error: ")


def test_a_step_without_a_trained_token_has_no_loss_and_spoils_no_mean(world, tmp_path):
    """Two of six documents have answers beyond ctx_len, so with one a step two steps train nothing."""
    rows = [{"question": "q" * (90 if i in (0, 3) else 3), "answer": f"{i} it is"} for i in range(6)]
    (tmp_path / "late.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--micro_bsz", 1, "--data_shuffle", 0, "--tensorboard", 1, "--lr_init", 0]
    out = train(world, "--data_file", tmp_path / "late.jsonl", *flags, name="late", picture=True)
    assert "2 samples with no trained token" in out
    lines = [json.loads(line) for line in (world / "late" / "loss_data.jsonl").read_text().splitlines()]
    assert [line["loss"] is None for line in lines] == [True, False, False, True, False, False]
    assert [line["trained"] == 0 for line in lines] == [line["loss"] is None for line in lines]
    assert "step 1/6, epoch 0, no trained token, lr 0," in out
    seen = [(line["loss"], line["trained"]) for line in lines if line["trained"]]
    mean = sum(loss * n for loss, n in seen) / sum(n for _, n in seen)
    assert (world / "late" / "train_log.txt").read_text().splitlines()[1].split()[1] == f"{mean:.6f}"
    shown = float(out.split("step 6/6, epoch 0, loss ")[1].split(",")[0])
    assert shown == pytest.approx(seen[-1][0], abs=1e-3)  # a short run shows its last step
    metrics = (world / "late" / "metrics.csv").read_text().splitlines()
    assert len(metrics) == 7
    assert "no picture" not in out
    assert np.isnan(read_run(world / "late")["loss"]).tolist() == [True, False, False, True, False, False]


@pytest.mark.parametrize("epoch_steps, cure", [(0, "--loss_mask all"), (2, "--epoch_steps 2")])
def test_a_run_that_meets_no_trained_token_is_refused_before_its_first_step(world, tmp_path, epoch_steps, cure):
    """Every answer lies beyond ctx_len; or only one that the run does not come to, as it ends after two steps of one sample."""
    last = 3 if epoch_steps else 90
    rows = [{"question": "q" * (last if i == 5 else 90), "answer": f"{i} it is"} for i in range(6)]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--data_file", tmp_path / "cut.jsonl", "--micro_bsz", 1, "--data_shuffle", 0]
    ended = run_to_end(world, *flags, "--epoch_steps", epoch_steps, name="nothing")
    assert ended.codes == [2], ended.said
    refusal = ended.said.splitlines()[-1]
    for words in ("nothing to train", "a larger --ctx_len, --dataload chunk, or --loss_mask all", cure):
        assert words in refusal
    assert not list((world / "nothing").glob("*.pth")) and not (world / "nothing" / "loss_data.jsonl").exists()
    assert run_to_end(world, *flags, "--epoch_steps", epoch_steps, "--dry_run", 1, name="nothing").codes == [2]
    if epoch_steps:  # four steps more, and the trained sample is met
        train(world, *flags, "--epoch_steps", 6, name="something")


@pytest.mark.parametrize("drawn", [0, 1, 2, 3])
def test_a_seed_drawn_for_the_run_is_asked_too_whether_anything_is_trained(world, tmp_path, drawn, monkeypatch):
    rows = [{"question": "q" * (3 if i == 3 else 90), "answer": f"{i} it is"} for i in range(6)]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("secrets.randbelow", lambda n: drawn)
    flags = ["--data_file", tmp_path / "cut.jsonl", "--micro_bsz", 1, "--epoch_steps", 2, "--random_seed", -1]
    argv = arguments(world, *flags, name=f"drawn{drawn}")
    if 3 in BatchSampler(6, 1, seed=drawn).order(0)[:2]:
        assert main(argv) == 0
        return
    with pytest.raises(UserError, match="none of the samples in 2 steps holds a trained token"):
        main(argv)
    assert not list((world / f"drawn{drawn}").glob("*.pth"))


def test_the_order_of_the_samples_decides_whether_a_short_run_trains_anything(world, tmp_path):
    rows = [{"question": "q" * (3 if i == 5 else 90), "answer": f"{i} it is"} for i in range(6)]
    (tmp_path / "cut.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = arguments(world, "--data_file", tmp_path / "cut.jsonl", "--micro_bsz", 1, "--epoch_steps", 2, "--epoch_count", 2)
    config = TrainConfig.from_argv(flags)
    data = TrainingData.open(config, load_model(world / "base.pth"))
    outcomes = set()
    for world_size in (1, 2):
        for seed in range(12):
            steps = [step for rank in range(world_size) for step in data.steps(rank, world_size, seed, 0, 4)]
            meets = any(bool((micro["targets"] >= 0).any()) for step in steps for micro in step)
            outcomes.add(meets)
            if meets:
                data.check_trained(world_size, seed)
            else:
                with pytest.raises(UserError, match="none of the samples in 4 steps holds a trained token"):
                    data.check_trained(world_size, seed)
    assert outcomes == {True, False}


def test_an_adapter_says_what_read_its_text_and_how_its_base_was_kept(world, tmp_path):
    train(world, "--quant", "int8", "--epoch_steps", 1, name="told")
    _, info = read_adapter(world / "told" / "rwkv-0.pth")
    assert info["tokenizer"] == {"kind": "byte", "encoding": "utf-8"} and info["quant"] == "int8"
    assert json.loads((world / "told" / "rwkv-0.json").read_text()) == info
    with BinidxWriter(tmp_path / "tokens", "uint16") as writer:
        writer.add(list(range(1, 30)))
    out = train(world, "--data_file", tmp_path / "tokens", "--data_type", "binidx", name="untold")
    assert "tokenizer:" not in out  # nobody knows what made those tokens
    assert not {"tokenizer", "quant"} & read_adapter(world / "untold" / "rwkv-0.pth")[1].keys()


def test_held_out_data_without_a_trained_token_are_refused_before_the_first_step(world, tmp_path):
    with BinidxWriter(tmp_path / "none", "uint16") as writer:
        writer.add([1, 2, 3], [0, 0, 0])
    ended = run_to_end(world, "--val_file", tmp_path / "none", "--data_type", "auto", name="unmeasured")
    assert ended.codes == [2] and "nothing to" in ended.said and not (world / "unmeasured" / "loss_data.jsonl").exists()


def test_fields_and_templates_of_ones_own_are_trained(world, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"frage": "2 + 2?", "antwort": "4", "text": "unused"}) + "\n")
    text = "Q: {{ messages[0].content }}\nA:{% generation %} {{ messages[1].content }}{% endgeneration %}"
    (tmp_path / "mine.jinja").write_text(text)
    names = ["--data_file", tmp_path / "rows.jsonl", "--fields", "question=frage,answer=antwort", "--show_batch"]
    assert main(arguments(world, *names, "--format", "question")) == 0
    assert "User: 2 + 2?\n\nAssistant:[[ 4]]" in capsys.readouterr().out
    assert main(arguments(world, *names, "--format", "question", "--template", tmp_path / "mine.jinja")) == 0
    assert "Q: 2 + 2?\nA:[[ 4]]" in capsys.readouterr().out
    with pytest.raises(UserError, match="can be read as text or question; say which by --format"):
        main(arguments(world, *names))


@pytest.mark.parametrize("template, asked", [
    ("world", "System: S\n\nInstruction: Add\n\nInput: 1 1\n\nResponse:"), ("g1", "System: S\n\nUser: Add\n1 1\n\nAssistant:")])
def test_a_model_is_asked_with_the_template_that_trained_it(world, tmp_path, capsys, monkeypatch, template, asked):
    row = {"instruction": "Add", "input": "1 1", "output": "2", "system": "S"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--data_file", tmp_path / "rows.jsonl", "--template", template]
    assert main(arguments(world, *flags, "--ctx_len", 128, "--show_batch")) == 0
    assert f"{asked}[[ 2]]" in capsys.readouterr().out
    train(world, *flags, "--ctx_len", 128, name=f"asked-{template}")
    prompts = []
    monkeypatch.setattr(generate, "completions", lambda model, tokenizer, texts, *rest, **options: prompts.extend(texts) or [])
    adapter = str(world / f"asked-{template}" / "rwkv-0.pth")
    generate.main(["--model", str(world / "base.pth"), "--peft_checkpoint", adapter, "--instruct", "--prompt", "Add", "--input",
                   "1 1", "--system", "S"])  # fmt: skip
    assert prompts == [asked]


def test_dry_run_prints_and_writes_no_training_file(world):
    out = train(world, "--dry_run", name="dry")
    assert "steps" in out and not (world / "dry").exists()
    assert "[[0 and 0 is 0. ]]" in out  # the first document, trained in whole


def test_training_goes_on_from_an_adapter_with_that_adapters_options(world, finished):
    start = world / "run" / "rwkv-2.pth"
    flags = ["--peft_checkpoint", str(start), "--lr_init", "0", "--epoch_steps", "1"]
    argv = arguments(world, *flags, name="further")
    del argv[argv.index("--r") : argv.index("--r") + 2]
    assert main(argv) == 0
    assert json.loads((world / "further" / "rwkv-0.json").read_text())["options"] == {"r": 8}
    further, before = open_tensors(world / "further" / "rwkv-0.pth"), open_tensors(start)
    assert all(torch.equal(further[name], before[name]) for name in before)
    with pytest.raises(UserError, match="has r 8, not 16; leave --r out"):
        main(arguments(world, *flags, "--r", "16", name="other"))


def test_initial_states_are_trained_alone_and_read_by_the_rwkv_package(world, tmp_path):
    argv = arguments(world, "--train_type", "state", "--lr_init", "0.3", "--epoch_count", "2", name="state")
    del argv[argv.index("--r") : argv.index("--r") + 2]
    assert main(argv) == 0
    seen = losses(world / "state")
    assert seen[-1][1] < seen[0][1]
    states = open_tensors(world / "state" / "rwkv-1.pth")
    assert {name: tuple(t.shape) for name, t in states.items()} == {f"blocks.{i}.att.time_state": (4, 8, 8) for i in range(2)}
    assert all(t.abs().max() > 0 for t in states.values())
    save_tensors(tmp_path / "base.pth", {name: t.float() for name, t in open_tensors(world / "base.pth").items()})
    tuned = load_model(world / "base.pth", torch.float32)
    load_adapter(tuned, world / "state" / "rwkv-1.pth")
    tokens = [72, 101, 108, 108, 111]
    theirs, _ = rwkv_package(tmp_path / "base.pth", tokens, [t.float() for t in states.values()])  # [value, key], as it is there
    with torch.no_grad():
        assert (tuned(torch.tensor([tokens]))[0][0] - theirs).abs().max() < 1e-4
        assert (load_model(world / "base.pth", torch.float32)(torch.tensor([tokens]))[0][0] - theirs).abs().max() > 1e-3


def test_a_quantised_base_trains_nearly_as_the_dense_one(world, finished):
    train(world, "--quant", "int8", "--epoch_count", 3, name="int8")
    dense, small = (losses(world / name) for name in ("run", "int8"))
    assert dense != small and small == [(step, pytest.approx(loss, rel=0.02)) for step, loss in dense]
    names = [list(open_tensors(world / name / "rwkv-2.pth")) for name in ("run", "int8")]
    assert names[0] == names[1]


def test_long_context_in_chunks_trains_as_the_whole_does(world):
    train(world, name="whole")
    train(world, "--train_type", "infctx", "--chunk_ctx", 8, name="chunks")
    train(world, "--train_type", "infctx", "--chunk_ctx", 8, "--truncate", name="truncated")
    whole, chunks, truncated = (losses(world / name) for name in ("whole", "chunks", "truncated"))
    close = [(step, pytest.approx(loss, abs=2e-5)) for step, loss in whole]
    assert chunks == close
    assert truncated[0] == close[0] and truncated[-1] != close[-1]  # the first loss is before any gradient was used
