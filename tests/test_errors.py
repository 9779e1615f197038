"""How commands end: errors.run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rwkv_bone.errors import Parser, UserError, run
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


def ended(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """Run `program` (Python) with the command line `words`."""
    command = [sys.executable, "-c", program, *words]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii"])
def test_what_the_terminal_cannot_encode_is_escaped(encoding):
    program = "from rwkv_bone.errors import UserError, run\ndef main():\n print('h\u4f60')\n raise UserError('\u597d')\nrun(main)"
    done = ended(program, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout, done.stderr) == (2, "h\\u4f60\n", "error: \\u597d\n")


WAITS = """
import os, signal, sys
from rwkv_bone.errors import run
def main():
    try:
        os.kill(os.getpid(), signal.{0})
        return 7
    finally:
        print("cleaned up")
run(main)
"""


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_that_ends_a_program_lets_it_clean_up(name, code):
    done = ended(WAITS.format(name))
    assert (done.returncode, done.stdout) == (code, "cleaned up\n")


def test_under_nohup_the_end_of_the_terminal_is_ignored():
    program = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + WAITS.format("SIGHUP")
    assert ended(program).returncode == 7


def test_a_file_name_that_is_too_long_is_one_line():
    done = ended("from rwkv_bone.errors import run; run(lambda: open('a' * 4000))")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too long" in done.stderr


def test_an_endless_name_does_not_hide_what_is_wrong_with_it():
    line = str(UserError(f"{'a' * 4000}.pth: no such file"))
    assert line.startswith("aaa") and line.endswith("aaa.pth: no such file") and len(line) < 200


def told(*words: str) -> str:
    parser = Parser(prog="p")
    parser.add_argument("--micro_bsz", type=int)
    parser.add_argument("file", nargs="?")
    with pytest.raises(UserError) as caught:
        parser.parse_args(list(words))
    return str(caught.value)


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_argument_is_told_with_what_stands_before_it(blank):
    assert "a blank argument after x" in told("--micro_bsz", "3", "x", blank)


@pytest.mark.parametrize("words", [["\r"], ["x", "\r"], ["--micro_bsz", "3\r"], ["x\r"]])
def test_a_script_with_windows_line_ends_is_named(words):
    assert "Windows line ends" in told(*words) and "\r" not in told(*words).replace("s/\\r", "")


@pytest.mark.parametrize("words", [["--micro_bsz", "--"], ["--micro_bsz=--"], ["--"], ["--micro_bsz", ["3"]]], ids=str)
def test_a_flag_is_never_given_a_list(words):
    assert "in a command line" in told(*words)


@pytest.mark.parametrize("word, said", [("--micro-bsz", "did you mean --micro_bsz?"), ("--mcro_bsz", "did you mean --micro_bsz?"),
                                        ("--fla", "see --help"), ("--ds_bucket_mb", "see --help")])  # fmt: skip
def test_only_what_is_near_is_suggested(word, said):
    assert told(word, "3").endswith(said)


@pytest.mark.slow
def test_programs_that_nobody_reads_end_quietly(tmp_path):
    make_world(tmp_path)
    generate = ["-m", "rwkv_bone.generate", "--model", "base.pth", "--prompt", "a", "--max_tokens", 20]
    evaluate = ["-m", "rwkv_bone.evaluate", "loss", "--model", "base.pth", "--data", "data.jsonl"]
    for command in (generate, evaluate, [ROOT / "train.py", "--help"], [ROOT / "train.py", *arguments(tmp_path)]):
        code, said = unread(command, tmp_path)
        assert code == 141 or (code == 0 and "--help" in command), command  # argparse may not tell that its help was not read
        assert not [line for line in said.splitlines() if "Error" in line or "Traceback" in line or "ignored" in line], said
