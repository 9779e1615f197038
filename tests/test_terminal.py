"""Numbers in words, and commands that can be typed."""

import shlex
import sys
from pathlib import Path

import pytest

from rwkv_bone.generate.command import make_parser as generate
from rwkv_bone.merging.command import make_parser as merge
from rwkv_bone.terminal import clock, counted, in_bytes, next_command


def test_numbers_in_words():
    assert [counted(n, "epoch") for n in (1, 2, 1000)] == ["1 epoch", "2 epochs", "1,000 epochs"]
    assert [in_bytes(n) for n in (5, 2048, 3 << 29)] == ["5 B", "2.0 KiB", "1.5 GiB"]
    assert [clock(s) for s in (65, 7200)] == ["1:05", "2:00:00"]


STARTS = [
    ("train.py", ["python", "merge.py"]),
    ("/opt/my bone/train.py", ["python", "/opt/my bone/merge.py"]),
    ("/usr/bin/rwkv-bone", ["rwkv-bone", "merge"]),
    ("/usr/lib/rwkv_bone/__main__.py", ["python", "-m", "rwkv_bone", "merge"]),
    ("-c", ["python", "merge.py"]),
]


@pytest.mark.parametrize(("started", "words"), STARTS)
def test_the_next_command_begins_as_this_program_was_started_and_is_quoted(started, words, monkeypatch):
    monkeypatch.setattr(sys, "argv", [started])
    text = next_command("merge", base_model="my base.pth", peft_checkpoint=Path("a $1/b'.pth"), quant="none", output="o.pth")
    assert shlex.split(text)[: len(words)] == words
    args = merge().parse_args(shlex.split(text)[len(words) :])
    assert (args.base_model, args.peft_checkpoint, args.output) == ("my base.pth", ["a $1/b'.pth"], "o.pth")
    assert "--quant" not in text


def test_the_next_command_holds_what_the_model_needs(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rwkv-bone"])
    text = next_command("generate", model="tuned.pth", tokenizer="my tokenizer.json", vocab_file="", chat=True, device="cpu")
    args = generate().parse_args(shlex.split(text)[2:])
    assert (args.tokenizer, args.vocab_file, args.chat) == ("my tokenizer.json", "", True)
    assert "--vocab_file" not in text and text.startswith("rwkv-bone generate")
    assert next_command("generate", model="m", prompt=None, tokenizer="auto") == "rwkv-bone generate --model m"


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    import rwkv_bone
    from rwkv_bone.__main__ import main

    monkeypatch.setattr("sys.argv", ["rwkv-bone", "--version"])
    assert main() == 0 and capsys.readouterr().out == f"rwkv-bone {rwkv_bone.__version__}\n"
