"""README's table "When something goes wrong": each row is provoked, and what it quotes is what the program says."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import small_model

from rwkv_bone import merging
from rwkv_bone.checkpoint import save_tensors
from rwkv_bone.errors import run
from rwkv_bone.training.run import main as train
from tests.runs import arguments, make_world

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
TABLE = README.split("## When something goes wrong")[1].split("\n## ")[0]
ROWS = [re.findall(r"`([^`]+)`", line.split(" | ")[0]) for line in TABLE.splitlines() if line.startswith("| `")]

MERGE = ["--base_model", "other.pth", "--peft_checkpoint", "run/rwkv-0.pth", "--output", "merged.pth"]
PROVOKED = {  # the row's first quotation: flags of train.py, or a command line of merge.py
    "wanted an RWKV-6 (x060) .pth, this is an RWKV-7 model": ["--load_model", "v7.pth"],
    "not a .pth of tensors": ["--load_model", "half.pth"],
    "--n_layer 3 contradicts base.pth, which has 2": ["--load_model", "base.pth", "--n_layer", "3"],
    "--parts attn names no projection of this model": ["--parts", "attn"],
    "the World vocabulary is not here": ["--tokenizer", "world"],
    "no tokenizer is known for a vocabulary of 2048": ["--load_model", "other.pth"],
    "line 2": ["--data_file", "broken.jsonl"],
    "was trained on another base": MERGE,
    "holds a run": ["--proj_dir", "run"],
    "gradient norm": ["--lr_init", "1e30", "--grad_clip", "0", "--epoch_count", "3"],
    "--accelerator gpu: this torch sees no GPU": ["--accelerator", "gpu"],
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = make_world(tmp_path_factory.mktemp("wrong"), rows=8)
    whole = (folder / "base.pth").read_bytes()
    (folder / "half.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    save_tensors(folder / "v7.pth", {"emb.weight": torch.ones(257, 32), "blocks.0.att.r_k": torch.ones(4, 8)})
    other = small_model(dtype=torch.bfloat16, vocab_size=2048, n_embd=32, dim_att=32, dim_ffn=64)
    save_tensors(folder / "other.pth", other.state_dict())
    assert train(arguments(folder, "--epoch_steps", 1)) == 0
    return folder


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_row_is_provoked_here():
    assert [row[0] for row in ROWS] == list(PROVOKED)


@pytest.mark.parametrize("quoted", ROWS, ids=lambda quoted: quoted[0])
def test_the_message_is_the_one_that_is_quoted(quoted, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if "World" in quoted[0]:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    before, flags = contents(world), PROVOKED[quoted[0]]
    with pytest.raises(SystemExit) as ended:
        run(lambda: merging.main(flags) if flags is MERGE else train(arguments(tmp_path, *usual(flags, world))))
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.fullmatch(r"error: [^\n]*" + "[^\n]*".join(map(re.escape, quoted)) + r"[^\n]*\n", said), said
    assert contents(world) == before


def usual(flags: list[str], world: Path) -> list[str]:
    """Model and data are the world's; what a run writes goes elsewhere, unless told."""
    files = {"--load_model": world / "base.pth", "--data_file": world / "data.jsonl"}
    return [str(word) for flag, path in files.items() if flag not in flags for word in (flag, path)] + flags
