"""How commands end: errors.run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.errors import run
from tests.runs import arguments, make_world

ROOT = Path(__file__).resolve().parents[1]


def unread(words: list, cwd: Path, close: str = "stdout") -> tuple[int, str]:
    """Run a command whose `close` (stdout or both) nobody reads; its exit code and what it says on stderr."""
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    stderr = writing if close == "both" else subprocess.PIPE
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(command, cwd=cwd, env=environment, stdout=writing, stderr=stderr, text=True, check=False)
    os.close(writing)
    return ended.returncode, ended.stderr or ""


@pytest.mark.parametrize("unbuffered", [[], ["-u"]], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize(
    "body",
    ["lambda: print('a line')", "lambda: print('much ' * 100000)", "lambda: (print('help'), exit(0))"],
    ids=["flushed at the end", "in the midst", "before an exit"],
)
def test_a_command_that_nobody_reads_ends_quietly_as_sigpipe_would_end_it(body, unbuffered, tmp_path):
    program = f"from rwkv_bone.errors import run; run({body})"
    assert unread([*unbuffered, "-c", program], tmp_path) == (141, "")


def test_an_error_whose_one_line_nobody_reads_is_quiet(tmp_path):
    program = "from rwkv_bone.errors import UserError, run\ndef main(): raise UserError('no')\nrun(main)"
    assert unread(["-c", program], tmp_path) == (2, "error: no\n")
    assert unread(["-c", program], tmp_path, "both")[0] == 141


def test_another_broken_pipe_is_an_error_like_any_other():
    def main():
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        run(main)


@pytest.mark.slow
def test_programs_that_nobody_reads_end_quietly(tmp_path):
    make_world(tmp_path)
    generate = ["-m", "rwkv_bone.generate", "--model", "base.pth", "--prompt", "a", "--max_tokens", 20]
    evaluate = ["-m", "rwkv_bone.evaluate", "loss", "--model", "base.pth", "--data", "data.jsonl"]
    for command in (generate, evaluate, [ROOT / "train.py", "--help"], [ROOT / "train.py", *arguments(tmp_path)]):
        code, said = unread(command, tmp_path)
        assert code == 141 or (code == 0 and "--help" in command), command  # argparse may not tell that its help was not read
        assert not [line for line in said.splitlines() if "Error" in line or "Traceback" in line or "ignored" in line], said
