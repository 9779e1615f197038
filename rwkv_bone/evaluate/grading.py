"""Which answers are right. Two graders: `math-verify` (the default) and `original`, the rules of the benchmarks' papers.

math-verify compares what is meant: fractions and decimals, sets in any order, intervals, equivalent expressions. Answers that are
the same text, or plain numbers, are decided here exactly; the others by the package math-verify, in a process of its own that is
ended where it needs more than `SECONDS` for an answer (which then counts as wrong).
"""

import importlib.metadata
import json
import operator
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ..errors import UserError
from . import original
from .final import HASHES, final_answer, last_number_in, number_in, tidy, value

GRADERS = ("math-verify", "original")
SECONDS = 10.0  # the longest that one answer may take
START_SECONDS = 120.0  # the longest that starting the process may take
LONGEST = 2000  # characters of an answer, or of the end of a text that states none, that are looked at
PROCESS = Path(__file__).with_name("math_verify_process.py")


class Grade(NamedTuple):
    answer: str | None  # as the solution gives it; None: it gives none
    correct: bool
    gave_up: bool = False  # it took too long to grade


class Grader(Protocol):
    name: str  # with its version: what tells results of one grader from another's

    def expected(self, solution: str) -> Any:
        """The final answer of a reference solution, for `grade`; None: there is none."""

    def grade(self, output: str, expected: Any) -> Grade: ...

    def close(self) -> None: ...


def open_grader(name: str, task: str) -> Grader:
    """The grader `name` of the task gsm8k or math. Close it at the end."""
    return Original(task) if name == "original" else MathVerify(task)


class Original:
    """The rules of the papers, see original.py."""

    name = "original"

    def __init__(self, task: str):
        self.expected: Callable[[str], Any] = original.gsm8k_answer if task == "gsm8k" else original.math_answer
        self.equal: Callable[[Any, Any], bool] = operator.eq if task == "gsm8k" else original.math_equal

    def grade(self, output: str, expected: Any) -> Grade:
        answer = self.expected(output)
        return Grade(None if answer is None else str(answer), answer is not None and bool(self.equal(answer, expected)))

    def close(self) -> None:
        pass


class MathVerify:
    """What is meant, not how it is written. gsm8k: the number after the first "####"; math: the last answer that is stated."""

    def __init__(self, task: str):
        try:
            self.name = f"math-verify {importlib.metadata.version('math-verify')}"
        except importlib.metadata.PackageNotFoundError:
            raise UserError("answers are graded with the package math-verify: pip install 'rwkv-bone[evaluate]', or give "
                            "--grader original for the rules of the papers") from None  # fmt: skip
        self.of_numbers = task == "gsm8k"
        self.process: subprocess.Popen[bytes] | None = None

    def expected(self, solution: str) -> str | None:
        if self.of_numbers:
            return stated_number(solution)
        answer = final_answer(solution)
        bare = answer is None and len(solution) <= 200 and "\n" not in solution.strip()  # the field holds the answer alone
        return (solution.strip() or None) if bare else answer

    def grade(self, output: str, expected: str) -> Grade:
        answer = stated_number(output) if self.of_numbers else final_answer(output)
        decided = False if self.of_numbers else None
        if answer is not None:
            decided = same_text_or_number(answer, expected)
        return self.ask(answer, output, expected) if decided is None else Grade(answer, decided)

    def ask(self, answer: str | None, output: str, expected: str) -> Grade:
        """What math-verify says, or that it took too long."""
        text = output[-LONGEST:] if answer is None else for_math_verify(answer[:LONGEST])
        said = [text, for_math_verify(expected), answer is not None]
        process = self.process = self.process or start()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(json.dumps(said).encode() + b"\n")
            process.stdin.flush()
            line = line_within(process, SECONDS)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):  # too slow, or ended by its memory
            self.close()
            return Grade(answer, False, gave_up=True)
        found, same = json.loads(line)
        return Grade(found if answer is None else answer, same)

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
            self.process = None


def line_within(process: "subprocess.Popen[bytes]", seconds: float) -> bytes:
    """The next line of its output; b"" where none comes in time: then the process is of no more use."""
    assert process.stdout
    lines: list[bytes] = []
    # a thread, as Windows knows no select() of pipes
    reading = threading.Thread(target=lambda pipe: lines.append(pipe.readline()), args=(process.stdout,), daemon=True)
    reading.start()
    reading.join(seconds)
    return lines[0] if lines else b""


def start() -> "subprocess.Popen[bytes]":
    process = subprocess.Popen([sys.executable, str(PROCESS)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    if line_within(process, START_SECONDS) != b"ready\n":
        process.kill()
        process.communicate()
        raise UserError("math-verify does not start; see python -c 'import math_verify', or give --grader original")
    return process


# ---------------------------------------------------------------- what needs no algebra

OPERATOR = re.compile(r"\s*(?:[*^/+×÷-]|\\(?:cdot|times|div|pi|sqrt))")
DECIMAL_COMMA = re.compile(r"(?<![\d,.])(\d+),(\d{1,2}|\d{4,})(?![\d,])")
UNIT_WORD = r"\\(?:text|mathrm|textbf)\s*\{[^{}]*\}|(?:of an? )?(?!(?:and|or|to|pi)\b)[A-Za-z]{2,}(?![A-Za-z])\.?"
UNIT = re.compile(rf"(?:\s*(?:{UNIT_WORD})(?:\s*\^\s*(?:[23]|\{{[23]\}}))?)*")
IN_BASE = re.compile(r"([0-9A-Za-z]+)\s*_\s*\{?\s*(\d+)\s*\}?")


def stated_number(text: str) -> str | None:
    """The final number of a solution of GSM8K, or the expression that it leaves to be worked out; None if it has no number."""
    marked = HASHES.search(text)
    stated = marked[1] if marked else final_answer(text)
    if stated is not None and (found := number_in(DECIMAL_COMMA.sub(r"\1.\2", stated.rsplit("=", 1)[-1]))):
        return found.string.strip() if OPERATOR.match(found.string, found.end()) else found[0].strip()
    found = None if marked else last_number_in(text)
    return found[0].strip() if found else None


def same_text_or_number(answer: str, expected: str) -> bool | None:
    """Whether two answers are the same, where that needs no algebra; None where it does."""
    texts = tidy(answer), tidy(expected)
    in_base = [IN_BASE.fullmatch(text) for text in texts]
    if in_base[0] and in_base[1]:
        return in_base[0].groups() == in_base[1].groups()
    equations = all("=" in text for text in texts)  # to which the rules of the paper are too kind: x = 5 is 5, and so is y = 5
    if texts[0] == texts[1] or (not equations and original.math_equal(*texts)):
        return True
    a, b = number_with_unit(answer), number_with_unit(expected)
    if a is None or b is None:
        return None
    rounded = "." in answer + expected and re.search(r"/|frac", answer + expected)  # 0.333333 and 1/3
    return a == b or (None if rounded else False)


def number_with_unit(text: str) -> Fraction | None:
    """The value of a number with nothing but a unit behind it."""
    found = number_in(text)
    alone = found and not found.string[: found.start()].strip() and UNIT.fullmatch(found.string.rstrip(), found.end())
    return value(found) if found and alone else None


def for_math_verify(answer: str) -> str:
    """An answer in the notation that math-verify reads."""
    answer = tidy(answer).replace(r"\varnothing", r"\emptyset")
    answer = re.sub(r"\\(sin|cos|tan|cot|sec|csc)\s*\{?(\d+)\s*\^\s*\{?\\circ\}?", r"\\\1(\2*\\pi/180)", answer)
    answer = re.sub(r"(?<![\w.])(\d*\.?\d+)[eE]([+-]?\d+)(?!\w)", r"\1 \\cdot 10^{\2}", answer)
    return re.sub(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}", repeating, answer)


def repeating(match: re.Match) -> str:
    r"""0.1\overline{6} as the fraction 15/90."""
    whole, fixed, period = match.groups()
    scale = 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + period) - int((whole + fixed) or 0)}}}{{{scale * (10 ** len(period) - 1)}}}"
