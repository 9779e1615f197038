"""GSM8K and MATH: ask a model every question and count the right answers.

Questions are put as in training (data/templates.py: "User: {question}\\n\\nAssistant:", or a template of one's own), after some
solved ones if asked for: the earlier turns of the same conversation. They are read once, and their state is where every question
begins.
"""

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.encode import RowEncoder
from ..data.files import read_batches
from ..data.templates import Message, Template
from ..data.tokenizer import Tokenizer
from ..errors import UserError
from ..generate import Sampling, completions, read
from ..models import LanguageModel, State
from ..terminal import Progress
from .grading import SECONDS, Grader
from .results import Results


@dataclass(frozen=True)
class Task:
    fields: dict[str, str]  # our name -> the file's
    max_tokens: int


TASKS = {
    "gsm8k": Task({"question": "question", "answer": "answer"}, 512),
    "math": Task({"question": "problem", "answer": "solution"}, 1024),
}


@dataclass(frozen=True)
class Problem:
    id: int  # its place in the files, from 0
    messages: list[Message]  # the question and its solution
    prompt: str  # as the model is asked, after what `shown` gives
    expected: Any  # the final answer, for the grader
    group: str  # e.g. MATH's subject


def read_problems(
    grader: Grader, paths: Sequence[str], encoder: RowEncoder, solution: str, limit: int = 0, shots: Sequence[Problem] = ()
) -> list[Problem]:
    """The problems of jsonl files, the first `limit` of them (0: all); `solution` names the field that ends with the answer.

    shots: solved problems that are shown before each.
    """
    before = shown_messages(shots)
    stretches = len(shown(encoder.template, shots))
    problems: list[Problem] = []
    rows = ((batch.where(number), row) for batch in read_batches(list(paths)) for number, row in batch.rows())
    for where, row in rows:
        if limit and len(problems) == limit:
            break
        try:
            talk = encoder.conversation(row)
            expected = grader.expected("" if row.get(solution) is None else str(row[solution]))
            if expected is None or talk is None or isinstance(talk, str):
                raise UserError(f"no question, or no answer in {solution!r}; name the fields by --fields")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        question = talk.messages[:-1] if not before else [m for m in talk.messages[:-1] if m["role"] != "system"]
        prompt = "".join(encoder.template.before_answer([*before, *question], talk.tools)[stretches:])
        group = row.get("subject") or row.get("type") or ""
        problems.append(Problem(len(problems), talk.messages, prompt, expected, str(group)))
    if not problems:
        raise UserError(f"{paths[0]} holds no problem")
    return problems


def shown_messages(shots: Sequence[Problem]) -> list[Message]:
    """Solved problems as one conversation, which has one system message at the most: the first problem's."""
    return [m for i, shot in enumerate(shots) for m in shot.messages if i == 0 or m["role"] != "system"]


def shown(template: Template, shots: Sequence[Problem]) -> list[str]:
    """The text of solved problems before a question, in stretches: by turns one not trained and an answer."""
    if not shots:
        return []
    messages = shown_messages(shots)
    *before, turn = template.before_answer([*messages, {"role": "user", "content": "question"}])
    if len(before) != 2 * sum(m["role"] == "assistant" for m in messages) or "question" not in turn:
        raise UserError(f"--shots: the template {template.name} does not write several turns, or leaves earlier answers out")
    return before


def read_shots(
    model: LanguageModel, tokenizer: Tokenizer, stretches: list[str], begin: tuple[int, ...] = ()
) -> State | None:
    """The state after `begin` and what `shown` gives; None where that is nothing."""
    tokens = tokenizer.encode_documents(stretches, [len(stretches)])[0].tolist() if stretches else []
    return read(model, [[*begin, *tokens]])[1] if tokens else None


ITEM = {"group": str, "correct": bool, "answer": str | None, "gave_up": bool, "reason": str, "tokens": int, "expected": str}


def solve(
    grader: Grader,
    model: LanguageModel,
    tokenizer: Tokenizer,
    problems: Sequence[Problem],
    results: Results,
    sampling: Sampling,
    max_tokens: int,
    stop: Sequence[str] = (),
    seed: int = 0,
    batch_size: int = 64,
    state: State | None = None,
    begin: tuple[int, ...] = (),
) -> None:
    """Ask for what `results` does not hold yet, and add each answer as it comes.

    state: after what is shown before each question; None: nothing is, and each begins with the tokens `begin`.
    """
    ids = {problem.id for problem in problems}
    right = sum(item["correct"] for item in results if item["id"] in ids)
    todo = [problem for problem in problems if problem.id not in results.done]
    done = len(problems) - len(todo)
    tokens, began = 0, time.monotonic()
    prompts = [[*begin, *tokenizer.encode(p.prompt)] if state is None else tokenizer.encode_after(p.prompt) for p in todo]
    with Progress(len(problems), done, "problems") as progress:
        for completion in completions(model, tokenizer, prompts, sampling, max_tokens, stop, seed, batch_size, state):
            problem = todo[completion.index]
            grade = grader.grade(completion.text, problem.expected)
            results.add(
                {
                    "id": problem.id,
                    "group": problem.group,
                    "correct": grade.correct,
                    "answer": grade.answer,
                    "expected": str(problem.expected),
                    "gave_up": grade.gave_up,
                    "reason": completion.reason,
                    "tokens": len(completion.tokens),
                    "prompt": problem.prompt,
                    "output": completion.text,
                }
            )
            done, right, tokens = done + 1, right + grade.correct, tokens + len(completion.tokens)
            rate = tokens / (time.monotonic() - began)
            progress.update(done, f"{right} of {done} right ({right / done:.1%}), {rate:,.0f} tokens/s")


def summary(results: Results, ids: set[int]) -> dict[str, Any]:
    """Counts and accuracies of the items in `ids`: in all, and by group where there are several."""
    items = [item for item in results if item["id"] in ids]
    groups = defaultdict(list)
    for item in items:
        groups[item["group"]].append(item["correct"])
    return {
        **accuracy([item["correct"] for item in items]),
        "no_answer": sum(item["answer"] is None for item in items),
        "cut": sum(item["reason"] == "length" for item in items),
        "gave_up": sum(item["gave_up"] for item in items),
        "tokens": sum(item["tokens"] for item in items),
        "groups": {name: accuracy(groups[name]) for name in sorted(groups)} if len(groups) > 1 else {},
    }


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Share of right answers and its standard error: the sample's standard deviation over sqrt(n), None for one item."""
    n, right = len(correct), sum(correct)
    p = right / n if n else 0.0
    return {"n": n, "right": right, "accuracy": p, "stderr": math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else None}


def describe(name: str, found: dict[str, Any], max_tokens: int) -> str:
    """The summary for people."""

    def line(label: str, a: dict[str, Any]) -> str:
        error = "" if a["stderr"] is None else f" ± {100 * a['stderr']:.2f} (standard error)"
        return f"{label}: {100 * a['accuracy']:.2f}%{error}, {a['right']} of {a['n']} right"

    lines = [line(name, found), *(line(f"  {group}", a) for group, a in found["groups"].items())]
    lines.append(f"{found['no_answer']} gave no answer, {found['cut']} were cut at {max_tokens} tokens")
    if found["gave_up"]:
        lines.append(f"{found['gave_up']} could not be graded within {SECONDS:.0f} s or the memory limit and count as wrong")
    return "\n".join(lines)
