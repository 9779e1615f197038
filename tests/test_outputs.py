"""What a run may touch: the files that it made itself, and no others, whatever they are called."""

import json
import os

import pytest
import torch

from rwkv_bone.errors import UserError
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.training import resume
from rwkv_bone.training.run import main
from tests.conftest import small_model
from tests.runs import arguments, make_world


@pytest.fixture
def world(tmp_path):
    return make_world(tmp_path)


def train(world, *flags) -> int:
    return main(arguments(world, "--epoch_steps", 2, *flags))


def test_overwriting_leaves_inputs_and_all_that_no_run_made(world):
    out = world / "run"
    out.mkdir()
    os.rename(world / "base.pth", out / "rwkv-6.pth")
    os.rename(world / "data.jsonl", out / "rwkv-train.jsonl")
    foreign = {"notes.tmp": b"mine", "rwkv-7.pth": b"another's", "rwkv-old.json": b"{}"}
    for name, content in foreign.items():
        (out / name).write_bytes(content)
    (out / "x.tmp").mkdir()
    inputs = ("--load_model", out / "rwkv-6.pth", "--data_file", out / "rwkv-train.jsonl")
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    for _ in range(2):
        assert train(world, *inputs, "--overwrite", 1) == 0
        assert {name: (out / name).read_bytes() for name in before} == before and (out / "x.tmp").is_dir()
    assert (out / "rwkv-0.pth").exists()


@pytest.mark.parametrize("planned", ["rwkv-0.pth", "rwkv-best.pth", "loss_data.jsonl", "config.json"])
def test_a_name_that_a_run_would_write_and_nobody_recorded_is_refused(world, planned):
    (world / "run").mkdir()
    (world / "run" / planned).write_bytes(b"mine")
    with pytest.raises(UserError, match="not a file of a run"):
        train(world, "--overwrite", 1)
    assert (world / "run" / planned).read_bytes() == b"mine"


def test_a_second_stage_in_the_same_folder_keeps_its_base(world):
    assert train(world, "--peft", "none") == 0
    base = (world / "run/rwkv-0.pth").read_bytes()
    second = ("--load_model", world / "run/rwkv-0.pth", "--overwrite", 1)
    with pytest.raises(UserError, match="is an input of this run"):
        train(world, *second)
    assert train(world, *second, "--epoch_begin", 1) == 0
    assert (world / "run/rwkv-0.pth").read_bytes() == base and (world / "run/rwkv-1.pth").exists()


def test_overwriting_removes_all_that_the_earlier_run_made(world):
    assert train(world, "--epoch_count", 3, "--save_every_steps", 1) == 0
    assert train(world, "--overwrite", 1) == 0
    assert [path.name for path in sorted((world / "run").glob("rwkv-*.pth"))] == ["rwkv-0.pth"]
    assert [path.name for path in (world / "run/checkpoints").iterdir()] == ["step-00000002.ckpt"]
    record = json.loads((world / "run/run_files.json").read_text())
    assert all((world / "run" / name).exists() for name in record["files"] if not name.startswith(("rwkv-best", "val_data")))


def test_where_a_checkpoint_cannot_be_written_the_adapter_is_there(world, monkeypatch):
    def full(*_):
        raise RuntimeError("PytorchStreamWriter failed writing file")  # what torch.save makes of a full disk

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot be written"):
        train(world)
    assert (world / "run/rwkv-0.pth").exists() and not list((world / "run").glob("**/*.tmp"))


def test_an_error_of_the_system_elsewhere_is_not_called_one_of_the_folder(world, monkeypatch):
    def broken(*_):
        raise OSError(28, "no space for a kernel", "/elsewhere")

    monkeypatch.setattr("rwkv_bone.training.loop.gradients", broken)
    with pytest.raises(OSError, match="no space for a kernel"):
        train(world)


def test_a_state_tuned_base_is_not_packed(world):
    model = load_model(world / "base.pth")
    model.add_initial_state()
    save_tensors(world / "tuned.pth", {name: t.detach() for name, t in model.state_dict().items()})
    with pytest.raises(UserError, match="initial state"):
        train(world, "--load_model", world / "tuned.pth", "--dataload", "pack")


def test_parts_beside_an_earlier_adapter_must_be_its_own(world):
    assert train(world, "--parts", "att") == 0
    earlier = ("--peft_checkpoint", world / "run/rwkv-0.pth", "--proj_dir", world / "next")
    with pytest.raises(UserError, match="leave --parts out"):
        train(world, *earlier, "--parts", "ffn")
    assert train(world, *earlier) == 0
    assert json.loads((world / "next/rwkv-0.json").read_text())["parts"] == ["att"]


def test_validation_in_chunks_takes_the_memory_of_a_chunk(world):
    from rwkv_bone.config import TrainConfig
    from rwkv_bone.training.objectives import TextObjective
    from rwkv_bone.training.strategies import Engine
    from rwkv_bone.training.validation import measure
    from tests.watch import peak_bytes

    model = small_model(dtype=torch.float32, vocab_size=257, n_embd=64, dim_att=64, dim_ffn=128)
    found = {}
    for kind in ("none", "infctx"):
        config = TrainConfig(data_file="-", train_type=kind, chunk_ctx=64, accelerator="cpu")
        objective, engine = TextObjective(config), Engine(config)
        engine.module, engine.model = lambda micro, state=None, o=objective: o.loss(model, micro, state), model
        idx = torch.arange(4096)[None] % 257
        micro = {"idx": idx, "targets": idx.roll(-1)}
        peak = peak_bytes(lambda e=engine, o=objective, c=config: found.update({c.train_type: measure(e, o, iter([micro]), c)}))  # noqa: B023
        found[f"{kind} peak"] = peak
    assert found["infctx"] == pytest.approx(found["none"], rel=1e-5)
    assert found["infctx peak"] < found["none peak"] / 8


def test_a_damaged_checkpoint_of_another_shape_is_passed_over(world, capsys):
    assert train(world, "--save_every_steps", 1) == 0
    torch.save({"step": "two"}, world / "run" / resume.name_of(2))
    assert train(world, "--resume", "auto") == 0
    assert "taking the checkpoint before" in capsys.readouterr().err
