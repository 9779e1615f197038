"""What Windows and macOS lack is used by nothing: the commands run where it is hidden, and without a compiler with --op torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.runs import make_world

ROOT = Path(__file__).resolve().parents[1]
# What is hidden goes before the first import. torch, numpy and Python's own modules may use it: they are imported first.
HIDDEN = """
import importlib, json, multiprocessing, os, pkgutil, select, signal, subprocess, sys, tempfile
import torch, numpy, tokenizers, torch._dynamo, matplotlib.pyplot
for name in ("fcntl", "resource", "pwd", "grp", "termios", "readline"):
    sys.modules[name] = None
for module, names in ((os, "getuid geteuid getpgid killpg fork sched_getaffinity sysconf sysconf_names uname"),
                      (signal, "SIGUSR1 SIGUSR2 SIGHUP SIGPIPE SIGALRM alarm setitimer"), (select, "poll epoll")):
    for name in names.split():
        delattr(module, name)
select.select = None  # of sockets alone there

import rwkv_bone
for module in pkgutil.walk_packages(rwkv_bone.__path__, "rwkv_bone."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)

from rwkv_bone.__main__ import COMMANDS
from rwkv_bone.errors import run

def command(line, codes=(0,)):
    name, *argv = line.split()
    try:
        run(lambda: importlib.import_module(COMMANDS[name][0]).main(argv) or 0)
    except SystemExit as end:
        assert end.code in codes, line
"""
USED = """
command("train --load_model base.pth --data_file data.jsonl --r 8 --ctx_len 32 --op torch --proj_dir run --lr_init 1e-2")
command("merge --base_model base.pth --peft_checkpoint run/rwkv-0.pth --output tuned.pth")
command("generate --model tuned.pth --op torch --prompt A --max_tokens 4")
command("evaluate loss --model tuned.pth --op torch --data data.jsonl")
command("evaluate gsm8k --model tuned.pth --op torch --data problems.jsonl --max_tokens 4")
command("data data.jsonl made --tokenizer byte --vocab_size 257 --workers 1")
command("plot run --out curves.png")
command("doctor", (0, 1))  # 1: there is no compiler

from rwkv_bone.evaluate.grading import open_grader
from rwkv_bone.ops import build
grader = open_grader("math-verify", "math")
assert grader.grade(r"It is $\\\\frac{1}{2}$, so \\\\boxed{\\\\frac{2}{4}x}.", r"\\\\frac{x}{2}").correct
grader.close()
assert build.private_folder().is_dir()
with build.lock(__import__("pathlib").Path("lock")) as alone:
    assert not alone
"""


def test_nothing_imports_or_calls_what_only_linux_has(tmp_path):
    make_world(tmp_path, rows=4)
    (tmp_path / "problems.jsonl").write_text(json.dumps({"question": "What is 2 + 2?", "answer": "It is\n#### 4"}) + "\n")
    empty = tmp_path / "bin"
    empty.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(empty)}  # no compiler
    done = subprocess.run([sys.executable, "-c", HIDDEN + USED], cwd=tmp_path, env=environment, capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "made.idx").exists() and (tmp_path / "curves.png").exists()
