"""Validation while training: the loss is that of the held-out documents, the best adapter is kept, patience ends the run."""

import json

import pytest
import torch

from rwkv_bone.data.documents import open_documents
from rwkv_bone.data.tokenizer import ByteTokenizer
from rwkv_bone.files.adapters import load_adapter
from rwkv_bone.files.models import load_model
from rwkv_bone.training.loader import split
from rwkv_bone.training.run import main
from tests.runs import arguments, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("validation"))
    rows = [{"text": f"{i} and {i} is {2 * i}."} for i in (31, 32, 33, 34, 35)]
    (folder / "val.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def measures(folder):
    return [json.loads(line) for line in (folder / "val_data.jsonl").read_text().splitlines()]


def test_the_logged_loss_is_that_of_the_held_out_documents_and_the_best_is_kept(world, capsys):
    flags = ("--val_file", world / "val.jsonl", "--val_every", 2, "--epoch_count", 1, "--lr_init", "1e-2")
    assert main(arguments(world, *flags, name="val")) == 0
    found = measures(world / "val")
    assert [m["step"] for m in found] == [2, 4, 6]
    best = min(found, key=lambda m: m["loss"])
    assert json.loads((world / "val" / "rwkv-best.json").read_text())["step"] == best["step"]
    model = load_model(world / "base.pth", torch.float32)
    load_adapter(model, world / "val" / "rwkv-best.pth")
    total = count = 0
    for tokens, _ in open_documents(world / "val.jsonl", "jsonl", ByteTokenizer(257), 257):
        idx = torch.from_numpy(tokens)
        with torch.no_grad():
            total += torch.nn.functional.cross_entropy(model(idx[None, :-1])[0][0], idx[1:], reduction="sum").item()
        count += len(idx) - 1
    assert best["loss"] == pytest.approx(total / count, abs=1e-5) and best["tokens"] == count
    out = capsys.readouterr().out
    assert "validation after step 2" in out
    folder = world / "val"
    for text in ("done       after step 6", f"saved      {folder}/rwkv-0.pth", f"{folder}/rwkv-best.pth, which"):
        assert text in out
    assert f"merge.py --base_model {world}/base.pth --peft_checkpoint {folder}/rwkv-best.pth --output" in out


def test_a_split_is_a_partition_of_the_documents(world):
    documents = open_documents(world / "data.jsonl", "jsonl", ByteTokenizer(257), 257)
    rest, held = split(documents, 0.25)
    assert (len(rest), len(held)) == (18, 6)
    a, b, whole = ([tuple(part[i][0].tolist()) for i in range(len(part))] for part in (rest, held, documents))
    assert sorted(a + b) == sorted(whole) and not set(a) & set(b)


def test_a_loss_that_is_not_finite_says_where_it_began(make_model):
    from rwkv_bone.training.objectives import not_finite_in

    micro = [{"idx": torch.randint(50, (1, 4))}]
    model = make_model(n_layer=3)
    assert not_finite_in(model, micro) == ""
    model.requires_grad_(False)
    model.blocks[1].ffn.value.weight[0, 0] = float("inf")
    assert not_finite_in(model, micro) == ", first not finite after blocks.1"
    model.blocks[1].ffn.value.weight.requires_grad_(True)
    assert not_finite_in(model, micro) == ", blocks.1.ffn.value.weight is not finite"
