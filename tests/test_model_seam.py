"""Everything works on a model that no room but this one knows (toy_model.py): the seam between a model and the program holds."""

import json
import re
from dataclasses import replace

import pytest
import torch

from rwkv_bone.compare.command import main as compare
from rwkv_bone.compare.comparison import Comparison
from rwkv_bone.compare.one_run import measure
from rwkv_bone.compare.study import Study
from rwkv_bone.errors import UserError
from rwkv_bone.evaluate.command import main as evaluate
from rwkv_bone.files.adapters import load_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import open_tensors, save_tensors
from rwkv_bone.generate.command import main as generate
from rwkv_bone.merging.command import main as merge
from rwkv_bone.models import MODELS
from rwkv_bone.models.x060 import RWKV6, RWKV6Sizes
from rwkv_bone.peft import METHODS, adapters, inject
from rwkv_bone.training.infctx import backward_in_chunks
from rwkv_bone.training.loss import cross_entropy_sum
from rwkv_bone.training.run import main as train
from tests.toy_model import Toy, ToySizes, file_name

IDX = torch.arange(40).view(2, 20) * 7 % 257


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(MODELS, "toy", Toy)


@pytest.fixture
def world(tmp_path):
    """A folder with a bf16 base model in its own layout, and documents of bytes."""
    model = Toy(ToySizes(257, 4, 16, 24)).initialise()
    save_tensors(tmp_path / "base.pth", {file_name(name): t.bfloat16() for name, t in model.state_dict().items()})
    rows = [{"question": f"{i} + {i}?", "answer": f"It is {2 * i}."} for i in range(24)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def flags(world, *more, name="run") -> list[str]:
    usual = {"--load_model": world / "base.pth", "--data_file": world / "data.jsonl", "--ctx_len": 24, "--micro_bsz": 4,
             "--lr_init": "1e-2", "--accelerator": "cpu", "--threads": 1, "--proj_dir": world / name}  # fmt: skip
    given = [str(word) for word in more]
    return [str(word) for flag, value in usual.items() if flag not in given for word in (flag, value)] + given


def losses(folder) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "loss_data.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["bone", "lora", "dora"])
def test_methods_train_and_merge_into_the_bases_own_layout(world, method, capsys):
    assert train(flags(world, "--peft", method, "--r", 8, "--epoch_count", 6, "--train_parts", "norms", "head")) == 0
    first, last = losses(world / "run")[0], losses(world / "run")[-1]
    assert last < first - 0.5
    assert re.search(r"norms +\d+ tensors", capsys.readouterr().out)
    base, adapter, merged = world / "base.pth", world / "run/rwkv-5.pth", world / "merged.pth"
    argv = ["--base_model", base, "--peft_checkpoint", adapter, "--output", merged, "--dtype", "fp32", "--verify"]
    assert merge([str(word) for word in argv]) == 0
    assert list(open_tensors(merged)) == list(open_tensors(base))
    adapted = load_model(base, torch.float32)
    load_adapter(adapted, adapter)
    assert adapters(adapted)["layers.0.mix.gate"].bias is not None
    torch.testing.assert_close(load_model(merged)(IDX)[0], adapted(IDX)[0], rtol=1e-4, atol=1e-4)
    within = re.search(r"within (\S+) of", capsys.readouterr().out)
    assert within and float(within[1]) < 1e-3


def test_full_training_and_a_new_model(world):
    assert train(flags(world, "--peft", "none", "--epoch_count", 3)) == 0
    assert losses(world / "run")[-1] < losses(world / "run")[0]
    new = ("--my_testing", "toy", "--vocab_size", 257, "--n_layer", 2, "--n_embd", 16)
    assert train(flags(world, "--load_model", "", "--peft", "none", *new, name="new")) == 0


@pytest.mark.parametrize("kind, sizes", [(RWKV6, RWKV6Sizes(256, 1, 64, 64, 224, 64)), (Toy, ToySizes(256, 1, 64, 64))])
def test_a_model_recommends_a_rate_for_every_method_and_less_for_a_wider_model(kind, sizes):
    with torch.device("meta"):
        narrow, wide = kind(sizes), kind(replace(sizes, n_embd=4096))
    for method in (*METHODS, "none", "of tomorrow"):
        assert 1e-5 <= wide.recommended_rate(method) < narrow.recommended_rate(method) / 10 <= 1e-3
    if narrow.cannot("state"):
        with pytest.raises(UserError, match="no initial state"):
            narrow.recommended_rate("state")
    else:
        assert wide.recommended_rate("state") == narrow.recommended_rate("state") > 0


CHUNKS = ("--train_type", "infctx", "--chunk_ctx", 8)
WAYS = [("--dataload", "pack"), (*CHUNKS, "--dataload", "chunk"), (*CHUNKS, "--dataload", "pack"), ("--grad_cp", 1)]


@pytest.mark.parametrize("how", WAYS)
def test_every_way_to_train_sees_the_same_loss_first(world, how):
    """One step over all documents: packed, in chunks or padded, the mean loss of the same tokens is the same."""
    everything = ("--ctx_len", 40, "--micro_bsz", 24, "--epoch_steps", 1)
    for name, more in (("padded", ()), ("other", how)):
        assert train(flags(world, *everything, *more, name=name)) == 0
    assert losses(world / "other")[0] == pytest.approx(losses(world / "padded")[0], rel=1e-5)


def test_gradients_in_chunks_are_those_of_the_whole():
    model = Toy(ToySizes(257, 2, 16, 24)).initialise().double()
    inject(model, METHODS["bone"], METHODS["bone"].Config(8))
    micro = {"idx": IDX[:, :-1], "targets": IDX[:, 1:]}

    def forward(piece, state):
        hidden, state = model.hidden(piece["idx"], state)
        return cross_entropy_sum(hidden, model.head.weight, piece["targets"]), state

    gradients = []
    for chunk in (19, 5):
        backward_in_chunks(forward, micro, chunk, False, lambda loss, last: loss.backward())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        model.zero_grad(set_to_none=True)
    for whole, chunked in zip(*gradients):
        torch.testing.assert_close(chunked, whole, rtol=1e-10, atol=1e-12)


def test_a_run_is_validated_and_resumed_bitwise(world):
    more = ("--val_split", 0.25, "--epoch_count", 2, "--save_every_steps", 1, "--keep_last", 20, "--peft", "dora", "--r", 4)
    assert train(flags(world, *more)) == 0
    whole, result = losses(world / "run"), open_tensors(world / "run/rwkv-1.pth")
    assert len((world / "run/val_data.jsonl").read_text().splitlines()) == 2
    for path in sorted((world / "run/checkpoints").glob("step-*"))[3:]:  # as if it had been killed after the third step
        path.unlink()
    (world / "run/rwkv-1.pth").unlink()
    assert train(flags(world, *more, "--resume", "auto")) == 0
    assert losses(world / "run") == whole
    again = open_tensors(world / "run/rwkv-1.pth")
    assert all(torch.equal(again[name], tensor) for name, tensor in result.items())


def test_what_the_model_does_not_have_is_refused(world):
    for more in (("--train_type", "state", "--peft", "none"), ("--op", "torch"), ("--train_parts", "time")):
        with pytest.raises(ValueError, match="Toy"):
            train(flags(world, *more))


def test_the_memory_estimate_and_the_summary_know_it(world, capsys):
    assert train(flags(world, "--dry_run", 1, "--train_type", "infctx", "--chunk_ctx", 4, "--dataload", "chunk")) == 0
    out = capsys.readouterr().out
    assert "Toy, vocab_size 257, n_layer 4, n_embd 16, width 24" in " ".join(out.split())
    assert re.search(r"memory +about [\d.]+ [KM]iB", out) and not (world / "run").exists()


def test_it_is_sampled_measured_and_compared(world, capsys):
    assert train(flags(world, "--r", 8)) == 0
    model = ["--model", str(world / "base.pth"), "--peft_checkpoint", str(world / "run/rwkv-0.pth"), "--device", "cpu"]
    generate([*model, "--prompt", "1 + 1?", "--prompt", "2 + 2?", "--max_tokens", "8", "--temperature", "0"])
    evaluate(["loss", *model, "--data", str(world / "data.jsonl"), "--out", str(world / "loss.jsonl")])
    assert "loss" in capsys.readouterr().out
    data = str(world / "data.jsonl")
    config = {"load_model": str(world / "base.pth"), "data_file": data, "held_out": data, "steps": 2,
              "ctx_len": 24, "micro_bsz": 4, "threads": 1, "accelerator": "cpu", "held_out_documents": 4,
              "methods": {"bone": {"r": 8}, "lora": {}}, "lrs": [1e-2], "extend": 0, "refine": 0, "seeds": [0]}  # fmt: skip
    (world / "config.json").write_text(json.dumps(config))
    study = Study(Comparison.read(world / "config.json"), world / "config")
    while waiting := study.to_do():  # here, and not in processes of their own, which would not know the model
        (world / "config/running" / study.key(waiting[0])).mkdir(parents=True)
        config, base = study.config(waiting[0]), waiting[0].entry.method == "base"
        study.add(waiting[0], measure(config, base, study.documents, study.held_out, study.held_out_ids))
    compare([str(world / "config.json"), "--report"])
    table = (world / "config/table.md").read_text()
    assert "bone" in table and "lora" in table
