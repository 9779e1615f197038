"""The table of docs/troubleshooting.md: each row is provoked, and what it quotes is what the program says."""

import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import small_model

from rwkv_bone.__main__ import main as console_main
from rwkv_bone.errors import run
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.merging import command as merging
from rwkv_bone.training.run import main as train
from tests.runs import arguments, make_world

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "troubleshooting.md").read_text()
TABLE = PAGE.split("\n## ")[0]
ROWS = [re.findall(r"`([^`]+)`", line.split(" | ")[0]) for line in TABLE.splitlines() if line.startswith("| `")]

MERGE = ["--base_model", "other.pth", "--peft_checkpoint", "run/rwkv-0.pth", "--output", "merged.pth"]
PROVOKED = {  # the row's first quotation: flags of train.py, or a command line of merge.py
    "wanted a model of RWKV-6 (x060), RWKV-7 (x070)": ["--load_model", "v5.pth"],
    "not a .pth of tensors": ["--load_model", "half.pth"],
    "--n_layer 3 contradicts base.pth, which has 2": ["--load_model", "base.pth", "--n_layer", "3"],
    "attn names no linear layer of this model": ["--parts", "attn"],
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
    save_tensors(folder / "v5.pth", {f"blocks.0.att.{name}": torch.ones(4, 8) for name in ("time_decay", "ln_x.weight")})
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
        monkeypatch.setitem(sys.modules, "pyrwkv_tokenizer", None)
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


T, M = ["train"], ["merge"]
MISTAKES = [  # what a new user types: the words after the command, and what is said
    (T, "--load_model nothere.pth", "nothere.pth: no such file"),
    (T, "--load_model data.jsonl", "data.jsonl: not a .pth of tensors"),
    (T, "--data_file nothere.jsonl", "nothere.jsonl: no such file"),
    (T, "--data_file base.pth", "base.pth is neither a binidx prefix nor named .jsonl, .json"),
    (T, "--data_file run", "run holds several kinds of data"),
    (T, "--data_file list.json --data_type utf-8", "list.json holds JSON objects"),
    (T, "--data_file data.jsonl --data_type binidx", "data.jsonl is neither a binidx prefix nor"),
    (T, "--data_file named.jsonl", "got the fields 'frage', 'antwort'; name them by --fields"),
    (T, "--data_file base.npy --fields question=frage", "--fields, --template and --format are for rows, and base.npy is numpy"),
    (T, "--peft lorra", "--peft lorra: unknown; there are none, bone"),
    (T, "--learning-rate 1e-4", "unknown flag --learning-rate; did you mean --lr_init?"),
    (T, "--lora_r=8", "unknown flag --lora_r; did you mean --r?"),
    (T, "--ctxlen 128", "unknown flag --ctxlen; did you mean --ctx_len?"),
    (T, "--lr_init fast", "argument --lr_init: invalid float value: 'fast'"),
    (T, "--quant nf4", "nf4 needs bitsandbytes; pip install 'rwkv-bone[quant]'"),
    (T, "--proj_dir data.jsonl", "--proj_dir data.jsonl: cannot be written"),
    (T, "--peft_checkpoint base.pth", "base.pth: is a whole model, not an adapter"),
    (M, "--base_model base.pth --peft_checkpoint base.pth --output m.pth", "base.pth: is a whole model, not an adapter"),
    (M, "--base_model base.pth --peft_checkpoint run --output m.pth", "run: not a file"),
    (M, "--base_model run/rwkv-0.pth --peft_checkpoint run/rwkv-0.pth --output m.pth", "this is no model known here"),
    (M, "--base_model wide.pth --peft_checkpoint run/rwkv-0.pth --output m.pth", "was trained on another base (base.pth)"),
    (["generate"], "--model run/rwkv-0.pth --prompt a", "run/rwkv-0.pth is an adapter, not a model"),
    (["generate"], "--model base.pth", "give --prompt or --prompt_file, or --chat"),
    (["evaluate", "gsm8k"], "--model base.pth --data data.jsonl", "data.jsonl, line 1: "),
    (["plot"], "nothere", "nothere: No such file"),
    (["data"], "data.jsonl", "the following arguments are required: out"),
    (["data"], "data.jsonl made --vocabsize 257", "unknown flag --vocabsize; did you mean --vocab_size?"),
    (["compare"], "list.json", "list.json: wanted an object with steps, held_out, load_model, data_file"),
    (["demo"], "data.jsonl/x", "data.jsonl/x: cannot be made (Not a directory)"),
    (["trian"], "", "no command 'trian'; there are download, train"),
]


@pytest.mark.parametrize("command, words, message", MISTAKES, ids=[" ".join([*c, w]) for c, w, _ in MISTAKES])
def test_a_new_users_mistake_is_one_line_and_changes_nothing(command, words, message, world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    (world / "list.json").write_text('[{"text": "a"}]')
    (world / "named.jsonl").write_text('{"frage": "a", "antwort": "b"}\n')
    wide = small_model(dtype=torch.bfloat16, vocab_size=257, n_embd=64, dim_att=64, dim_ffn=64)
    save_tensors(world / "wide.pth", wide.state_dict())
    flags = words.split()
    if command is T:
        flags = [word for flag in ("--load_model base.pth", "--data_file data.jsonl", "--proj_dir new")
                 if flag.split()[0] not in words for word in flag.split()] + flags  # fmt: skip
    before = contents(world)
    monkeypatch.setattr(sys, "argv", ["rwkv-bone", *command, *flags])
    with pytest.raises(SystemExit) as ended:
        run(console_main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1 and message in said, said
    assert contents(world) == before
