"""Evaluation: what is a right answer, what is counted, going on after an interruption, and the loss of any text."""

import concurrent.futures
import importlib.metadata
import json
import math
import re
import time
from decimal import Decimal
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rwkv_bone.data.binidx import BinidxWriter
from rwkv_bone.data.documents import Documents, open_documents
from rwkv_bone.data.encode import RowEncoder
from rwkv_bone.data.tokenizer import ByteTokenizer
from rwkv_bone.errors import UserError, run
from rwkv_bone.evaluate import grading, problems
from rwkv_bone.evaluate import loss as loss_module
from rwkv_bone.evaluate.command import main
from rwkv_bone.evaluate.grading import open_grader
from rwkv_bone.evaluate.loss import document_losses
from rwkv_bone.evaluate.original import gsm8k_answer, math_answer, math_equal
from rwkv_bone.evaluate.results import Results
from rwkv_bone.files.models import load_model
from rwkv_bone.files.pth import save_tensors
from rwkv_bone.generate import GREEDY, Completion, generate
from tests.runs import program

BYTES = ByteTokenizer(257)


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---------------------------------------------------------------- the papers' graders


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_solution_of_gsm8k_is_right_and_a_changed_one_is_wrong(data, split):
    solutions = [row["answer"] for row in rows(data / "gsm8k" / f"{split}.jsonl")]
    assert len(solutions) == {"train": 7473, "test": 1319}[split]
    for solution in solutions:
        reasoning, number = solution.split("#### ")
        expected = Decimal(number.replace(",", ""))
        assert gsm8k_answer(solution) == expected
        assert gsm8k_answer(f"{reasoning}#### {expected + 1:,}") == expected + 1
        assert gsm8k_answer(f"{reasoning}#### {-expected or 1:,}") != expected
        assert gsm8k_answer(f"{reasoning}The answer is: ${expected:,}.00.") == expected
        assert gsm8k_answer(f"{reasoning}The answer is {expected * 10 + 1}") != expected


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("5 and 6\n####18.\n\nUser: 7", "18"),
        ("#### -$5.50", "-5.5"),
        ("#### $-3", "-3"),
        ("####\n 42%", "42"),
        ("so it is 12.", "12"),
        ("he pays -$1,234.50 back", "-1234.5"),
        ("7-5", "5"),
        ("(2+1)-5", "5"),
        ("7 - 5 = -2", "-2"),
        ("a total of \u22128", "-8"),
        ("3,4", "4"),
        ("**18** eggs", "18"),
        (".5", "0.5"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_the_number_of_a_text(text, number):
    assert gsm8k_answer(text) == Decimal(number)


def test_a_text_without_a_number_has_no_answer():
    assert gsm8k_answer("I do not know. #### none") is None
    assert gsm8k_answer("") is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_solution_of_math_is_right_and_a_changed_one_is_wrong(data, split):
    """But for one test problem, which redefines the box and says that its answer (6) is not boxed."""
    problems = rows(data / "math" / f"{split}.jsonl")
    odd = 0
    for row in problems:
        answer = math_answer(row["solution"])
        if "that we have not boxed the correct answer" in row["solution"]:
            assert answer == "12"
            odd += 1
            continue
        assert answer == row["answer"]
        assert math_equal(answer, row["answer"])
        changed = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), answer, count=1)
        assert not math_equal(changed if changed != answer else answer + "x", row["answer"]), answer
        for same in (answer.replace(r"\frac", r"\dfrac"), answer.replace("(", r"\left("), rf"{answer}\!", rf"\${answer}"):
            assert math_equal(same, row["answer"]), (same, row["answer"])
    assert odd == (split == "test")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{1} or rather $\boxed{\frac{1}{\sqrt{2}}}$.", r"\frac{1}{\sqrt{2}}"),
        (r"\fbox{7}", "7"),
        (r"$\boxed 9.$", "9"),
        (r"$\boxed \pi$", r"\pi"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),
        (r"\boxed{\text{a}}{b}", r"\text{a}"),
        (r"\boxed{1} and then \boxed{2", None),
        (r"\boxed", None),
        ("The answer is: $\\frac12$.", r"\frac12"),
        ("The answer is 3\nThe answer is: 4", "4"),
        (r"\boxed{5}. The answer is: 6", "5"),
        ("no answer", None),
    ],
)
def test_the_boxed_answer_of_a_text(text, answer):
    assert math_answer(text) == answer


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (r"\tfrac{1}{2} +\! \frac1{72}", r"\\dfrac{1}{2} +\frac{1}{72}", True),
        (r"10\text{ units}", "10 ", True),
        (r"10\text{ units}", "100 ", False),
        (r"\$12.50", "12.50", True),
        ("0.1", ".1", True),
        ("x = .5", r"\frac12", True),
        (r"\left(x-2\right)\left(x+2\right)", "(x-2)(x+2)", True),
        (r"10\%", "10", True),
        (r"\sqrt3 + \sqrt{4}", r"\sqrt{3}+\sqrt4", True),
        (r"\frac34i", r"\frac{3}{4}i", True),
        ("-3/4", r"\frac{-3}{4}", True),
        (r"90^{\circ}", r"90^\circ", True),
        ("k=7", "7", True),
        ("abc=7", "7", False),
        ("x+y=7", "7", False),
        ("10, 4", "4, 10", False),
        ("2/4", r"\frac{1}{2}", False),
        (r"\frac", r"\frac", True),
        (r"\frac1", r"\frac2", False),
        (r"1\text{ a}\text{ b}", r"1\text{ a}\text{ b}", True),
        ("", "0", False),
    ],
)
def test_answers_that_the_grader_of_math_takes_for_the_same(a, b, same):
    assert math_equal(a, b) is same and math_equal(b, a) is same


# ---------------------------------------------------------------- the default grader

HARD = (  # solution's end, reference answer, whether it is right, why that is hard
    (r"\boxed{0.5}", r"\frac{1}{2}", True, "a decimal and a fraction"),
    (r"\boxed{\frac{2}{4}}", r"\frac12", True, "a fraction that is not reduced"),
    (r"\boxed{0.33}", r"\frac13", False, "rounded to two places"),
    (r"\boxed{1\frac{1}{2}}", r"\frac{3}{2}", True, "a mixed number is a sum"),
    (r"\boxed{\frac{1}{-2}}", r"-\frac{1}{2}", True, "the sign below the line"),
    (r"\boxed{0.1\overline{6}}", r"\frac{1}{6}", True, "a repeating decimal"),
    (r"\boxed{\frac{\sqrt{2}}{2}}", r"\frac{1}{\sqrt{2}}", True, "a root below the line"),
    (r"\boxed{\sqrt{12}}", r"2\sqrt{3}", True, "a factor drawn out of a root"),
    (r"\boxed{3.14}", r"\pi", False, "an approximation of a constant"),
    (r"\boxed{1.2 \times 10^3}", "1200", True, "scientific notation"),
    (r"\boxed{1.2e3}", "1200", True, "a programmer's notation, where e is no constant"),
    (r"\boxed{12,345}", "12345", True, "a comma between thousands"),
    (r"\boxed{1\,234\,567}", "1234567", True, "thin spaces between thousands"),
    (r"\boxed{12,34}", "1234", False, "two numbers, not thousands"),
    (r"\boxed{123456789123456789}", "123456789123456788", False, "digits beyond a float's"),
    (r"\boxed{0.0000001}", "0.0000002", False, "digits beyond six places"),
    (r"\boxed{(x+1)(x-1)}", "x^2-1", True, "a product and its expansion"),
    (r"\boxed{x^2+1}", "x^2-1", False, "one sign"),
    (r"\boxed{2\ln 2}", r"\ln 4", True, "a rule of logarithms"),
    (r"\boxed{\tan 45^\circ}", "1", True, "an angle in degrees"),
    (r"\boxed{\binom{5}{2}}", "10", True, "a binomial that is not worked out"),
    (r"\boxed{3, 1}", "1, 3", True, "solutions in another order"),
    (r"\boxed{1, 3}", "1, 3, 5", False, "a solution is missing"),
    (r"\boxed{x = 1 \text{ or } x = 3}", "1, 3", True, "solutions with their variable"),
    (r"\boxed{1 \pm \sqrt{2}}", r"1-\sqrt{2}, 1+\sqrt{2}", True, "two solutions in one sign"),
    (r"\boxed{2}", r"\pm 2", False, "one of two solutions"),
    (r"\boxed{(2, 1)}", "(1, 2)", False, "coordinates in another order"),
    (r"\boxed{[1, 2]}", "(1, 2)", False, "a closed interval for an open one"),
    (r"\boxed{x \ge 3}", r"[3, \infty)", True, "an inequality and its interval"),
    (r"\boxed{(-\infty, 3) \cup (5, \infty)}", r"(5,\infty)\cup(-\infty,3)", True, "a union in another order"),
    (r"\boxed{y = 5}", "x = 5", False, "another variable"),
    (r"\boxed{2y = 4x + 6}", "y = 2x + 3", True, "a multiple of an equation"),
    (r"\boxed{3-2i}", "3+2i", False, "the conjugate"),
    (r"\boxed{\begin{bmatrix} 0.5 \\ 2 \end{bmatrix}}", r"\begin{pmatrix} \frac12 \\ 2 \end{pmatrix}", True, "other brackets"),
    (r"\boxed{101_2}", "101_3", False, "the same digits in another base"),
    (r"\boxed{\textbf{(B)}}", r"\text{B}", True, "a letter that chooses"),
    (r"\boxed{\text{odd}}", r"\text{even}", False, "a word"),
    (r"\boxed{5.50\text{ dollars}}", r"\$5.5", True, "a unit before or behind"),
    (r"\boxed{\varnothing}", r"\emptyset", True, "two signs of one set"),
    (r"\boxed{5}. Wait, I forgot one. The answer is: 6", "6", True, "a boxed answer that is taken back"),
    (r"\boxed{5}. Wait, I forgot one. The answer is: 6", "5", False, "a boxed answer that is taken back"),
    (r"\boxed{5}. To check that the answer is correct: 2+3=5", "5", True, "words that state no answer"),
    (r"\boxed{5}. Clearly the answer is not 6.", "5", True, "a statement that is denied"),
    (r"so $\boxed{1}$ and $\boxed{3}$.", "1, 3", True, "two boxes are one answer"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "0.5", True, "stated in words, with more behind"),
    ("The answer is 7, where $a=3$ and $b=4$.", "7", True, "formulas behind the answer"),
    ("**Answer:** 3/4 of a cup", r"\frac{3}{4}", True, "no formula, and a unit of words"),
    (r"We find \( 3 \cdot 4 = 12 \).", "12", True, "nothing states it: the last formula"),
    ("I cannot solve this.", "5", False, "there is no answer"),
)  # fmt: skip


@pytest.fixture(scope="module")
def graders():
    found = {task: open_grader("math-verify", task) for task in ("gsm8k", "math")}
    yield found
    for grader in found.values():
        grader.close()


@pytest.mark.parametrize(("solution", "reference", "right", "why"), HARD, ids=[f"{i}: {case[3]}" for i, case in enumerate(HARD)])
def test_math_is_graded_by_what_is_meant(graders, solution, reference, right, why):
    grade = graders["math"].grade(solution, graders["math"].expected(reference))
    assert grade.correct is right and not grade.gave_up, why


@pytest.mark.parametrize(
    ("solution", "value"),
    [
        ("#### 1/2", "0.5"),
        ("#### 1.2e3", "1200"),
        ("#### 12,34", "12.34"),
        ("#### 1,234", "1234"),
        ("#### 10 000", "10000"),
        ("#### 1 1/2 cups", "1.5"),
        ("#### ½", "0.5"),
        (r"#### \frac{3}{4}", "0.75"),
        ("#### 3 * 4", "12"),
        ("#### 3 * 4 = 12", "12"),
        ("#### -$5.50", "-5.5"),
        ("#### **18** dollars", "18"),
        ("5 and 6\n####18.\n\nUser: 7", "18"),
        ("The answer is 5. That took 3 steps.", "5"),
        (r"so \boxed{18} eggs in 2 boxes", "18"),
        ("he pays \u2212$1,234.50 back", "-1234.5"),
        ("(2+1)-5", "5"),
    ],
)
def test_gsm8k_is_graded_by_the_value_of_its_final_number(graders, solution, value):
    grader = graders["gsm8k"]
    assert grader.grade(solution, value).correct
    assert not grader.grade(solution, str(Decimal(value) + 1)).correct
    for misread in ("1", "1.2", "1234", "34") if solution in ("#### 1/2", "#### 1.2e3", "#### 12,34") else ():
        assert not grader.grade(solution, misread).correct


@pytest.mark.parametrize("task", ["gsm8k", "math"])
def test_the_data_sets_own_solutions_are_right_and_changed_ones_are_wrong(graders, data, task):
    grader = graders[task]
    for row in rows(data / task / "test.jsonl")[::10]:
        solution = row["answer" if task == "gsm8k" else "solution"]
        expected = grader.expected(solution)
        assert grader.grade(solution, expected).correct, solution
        changed = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), expected, count=1)
        changed = rf"\boxed{{{changed if changed != expected else expected + 'x'}}}"
        assert not grader.grade(changed, expected).correct, changed


def test_an_answer_that_cannot_be_worked_out_ends_only_its_own_grading(graders, monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1.0)
    grader = graders["math"]
    assert grader.grade(r"\boxed{x-1-(1-x)}", "2x-2").correct  # the process is there
    began = time.monotonic()
    assert grader.grade(r"\boxed{9^{9^{9^{9}}}}", "5") == (r"9^{9^{9^{9}}}", False, True)
    assert time.monotonic() - began < 5
    monkeypatch.undo()
    with concurrent.futures.ThreadPoolExecutor() as pool:  # where signals cannot end anything
        assert pool.submit(grader.grade, r"\boxed{x-1-(1-x)}", "2x-2").result().correct


@pytest.mark.parametrize("piece", [r"\boxed{", "\\boxed{\n", "1,", "1 ", " ab", r"\frac{1", "$a ", "answer: * ", "answer to "])
def test_no_text_keeps_the_graders_own_rules_busy(graders, piece):
    began = time.process_time()
    for task in graders:
        graders[task].grade(piece * 3000, "5")
    assert time.process_time() - began < 2


def test_without_the_package_one_line_says_how_to_go_on(gsm8k, model_file, pupil, monkeypatch):
    monkeypatch.setattr(grading.importlib.metadata, "version", missing)
    with pytest.raises(UserError, match=r"pip install 'rwkv-bone\[evaluate\]'.*--grader original"):
        evaluate("gsm8k", "--model", "none.pth", "--data", gsm8k)
    evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--grader", "original")


def missing(name):
    raise importlib.metadata.PackageNotFoundError(name)


# ---------------------------------------------------------------- asking for answers


@pytest.fixture
def gsm8k(tmp_path):
    """Nine problems whose answers are 0 to 8."""
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps({"question": f"What is {i}?", "answer": f"It is\n#### {i}"}) + "\n" for i in range(9)))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """Results go where the user stands."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model_file(make_model, tmp_path):
    save_tensors(tmp_path / "m.pth", make_model(vocab_size=257, dtype=torch.float32).state_dict())
    return tmp_path / "m.pth"


@pytest.fixture
def pupil(monkeypatch):
    """Stands in for the model: knows 0 to 4, is wrong on 5 and 6, has no answer to 7 and no end on 8. `asked`: the prompts."""
    state = SimpleNamespace(asked=[], tired_after=99)

    def completions(model, tokenizer, prompts, sampling, max_tokens, stop, *rest):
        for index, prompt in sorted(enumerate(prompts), key=lambda item: -item[0]):
            if len(state.asked) == state.tired_after:
                raise KeyboardInterrupt
            prompt = tokenizer.decode(prompt)
            state.asked.append(prompt)
            i = int(re.search(r"\d", prompt)[0])
            text = f" It is\n#### {i}" if i < 5 else f" {i} + 1" if i < 7 else " Well" if i == 7 else " 1, 2, 3, 4"
            yield Completion(index, text, [1] * 3, "length" if i == 8 else "end")

    monkeypatch.setattr(problems, "completions", completions)
    return state


def evaluate(*args):
    main([str(arg) for arg in args])


def test_answers_are_counted_with_their_standard_error_and_written(gsm8k, model_file, pupil, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    pupil_knows = [True] * 5 + [False, False, False, False]
    evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--out", out)
    text = capsys.readouterr().out
    stderr = np.std(pupil_knows, ddof=1) / math.sqrt(9)
    assert f"gsm8k: 55.56% ± {100 * stderr:.2f} (standard error), 5 of 9 right" in text
    assert "1 gave no answer, 1 were cut at 512 tokens" in text
    _, *items = rows(out)
    assert [item["correct"] for item in sorted(items, key=lambda item: item["id"])] == pupil_knows
    first = next(item for item in items if item["id"] == 3)
    assert first["prompt"] == "User: What is 3?\n\nAssistant:" and first["output"] == " It is\n#### 3"
    assert (first["answer"], first["expected"], first["reason"]) == ("3", "3", "end")


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(gsm8k, model_file, pupil, tmp_path, capsys):
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--out", whole)
    expected = capsys.readouterr().out
    pupil.asked, pupil.tired_after = [], 4
    with pytest.raises(KeyboardInterrupt):
        evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--out", parts)
    parts.write_bytes(parts.read_bytes()[:-20])  # a crash within the last line
    asked, pupil.asked, pupil.tired_after = pupil.asked, [], 99
    evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--out", parts)
    assert set(pupil.asked) & set(asked) == {asked[-1]} and len({*pupil.asked, *asked}) == 9
    said = capsys.readouterr()
    assert said.out.splitlines()[:2] == expected.splitlines()[:2]
    assert f"3 items are taken from {parts}; --overwrite starts anew\n" in said.err
    assert sorted(parts.read_text().splitlines()) == sorted(whole.read_text().splitlines())
    pupil.asked = []
    evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--out", parts)
    assert pupil.asked == [] and capsys.readouterr().out.splitlines()[:2] == expected.splitlines()[:2]


def test_more_problems_can_follow_and_a_summary_is_of_those_asked_for(gsm8k, model_file, pupil, tmp_path, capsys):
    for limit, text in ((4, "4 of 4 right"), (6, "5 of 6 right"), (2, "2 of 2 right")):
        evaluate("gsm8k", "--model", model_file, "--data", gsm8k, "--out", tmp_path / "r.jsonl", "--limit", limit)
        assert text in capsys.readouterr().out
    assert len(pupil.asked) == 6


def test_results_of_other_settings_are_not_mixed(gsm8k, model_file, pupil, tmp_path):
    common = ["gsm8k", "--model", model_file, "--data", gsm8k, "--out", tmp_path / "r.jsonl"]
    evaluate(*common)
    with pytest.raises(UserError, match=r"results of another max_tokens \(512, now 100\); give another --out, or --overwrite"):
        evaluate(*common, "--max_tokens", 100)
    with pytest.raises(UserError, match=r"results of another grader \(math-verify \S+, now original\)"):
        evaluate(*common, "--grader", "original")
    gsm8k.write_text(gsm8k.read_text() + "\n")
    with pytest.raises(UserError, match="results of another data"):
        evaluate(*common)
    evaluate(*common, "--overwrite")
    (tmp_path / "r.jsonl").write_text("{}\nnothing\n")
    with pytest.raises(UserError, match="another task"):
        evaluate(*common)


def test_results_lie_where_the_user_stands_unless_told_otherwise(gsm8k, model_file, pupil, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    evaluate("gsm8k", "--model", model_file, "--data", gsm8k)
    assert len(rows(tmp_path / "elsewhere" / "m.gsm8k-test.jsonl")) == 10


def test_math_is_judged_by_its_grader_and_by_subject(model_file, monkeypatch, tmp_path, capsys):
    file = tmp_path / "math.jsonl"
    data = [("algebra", r"\frac12", r"\dfrac{1}{2}"), ("algebra", "3", "4"), ("geometry", "x", "x")]
    problem_rows = [{"subject": s, "problem": f"P{a}", "solution": rf"\boxed{{{a}}}"} for s, a, _ in data]
    file.write_text("".join(json.dumps(row) + "\n" for row in problem_rows))
    said = {f"User: P{a}\n\nAssistant:": rf" Thus $\boxed{{{b}}}$." for _, a, b in data}
    monkeypatch.setattr(
        problems,
        "completions",
        lambda model, tokenizer, prompts, *rest: (
            Completion(i, said[tokenizer.decode(p)], [1], "end") for i, p in enumerate(prompts)
        ),
    )
    evaluate("math", "--model", model_file, "--data", file)
    out = capsys.readouterr().out
    assert "math: 66.67% ± 33.33 (standard error), 2 of 3 right" in out
    assert "algebra: 50.00% ± 50.00 (standard error), 1 of 2 right" in out
    assert "geometry: 100.00%, 1 of 1 right" in out


def test_problems_shown_before_are_read_once_and_change_nothing_else(gsm8k, model_file, tmp_path):
    shots = tmp_path / "train.jsonl"
    shots.write_text("".join(json.dumps({"question": f"Say {i}\n\n!", "answer": f"#### {i}"}) + "\n" for i in range(3)))
    out = tmp_path / "r.jsonl"
    evaluate("gsm8k", "--model", model_file, "--dtype", "fp64", "--data", gsm8k, "--out", out, "--shots", 2,
             "--shots_data", shots, "--max_tokens", 12, "--batch_size", 4)  # fmt: skip
    prefix = "User: Say 0\n!\n\nAssistant: #### 0\n\nUser: Say 1\n!\n\nAssistant: #### 1\n\n"
    prompts = [f"{prefix}User: What is {i}?\n\nAssistant:" for i in range(9)]
    stop = ("\n\nUser:", "\n\nInstruction:")
    expected = generate(load_model(model_file, torch.float64), BYTES, prompts, GREEDY, 12, stop)
    items = {item["id"]: item["output"] for item in rows(out)[1:]}
    assert [items[i] for i in range(9)] == [completion.text for completion in expected]


def test_a_template_and_field_names_make_the_questions(model_file, pupil, tmp_path):
    template, file = tmp_path / "t.jinja", tmp_path / "d.jsonl"
    template.write_text("Q: {{ messages[0].content }}\nA:{% generation %} {{ messages[1].content }}{% endgeneration %}")
    file.write_text(json.dumps({"ask": "What is 4?", "tell": "#### 4"}))
    fields = "question=ask,answer=tell"
    evaluate("gsm8k", "--model", model_file, "--data", file, "--template", template, "--fields", fields)
    assert pupil.asked == ["Q: What is 4?\nA:"]
    with pytest.raises(UserError, match="does not write several turns"):
        evaluate("gsm8k", "--model", model_file, "--data", file, "--template", template, "--fields", fields, "--shots", 1,
                 "--shots_data", file)  # fmt: skip


# ---------------------------------------------------------------- loss


@torch.no_grad()
def direct(model, tokens, counted):
    """Sum and number by one pass over the whole document."""
    if len(tokens) < 2:
        return 0.0, 0
    logits, _ = model(torch.tensor(tokens)[None, :-1])
    nll = -logits[0].double().log_softmax(-1).gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
    counted = torch.tensor(counted[1:])
    return nll[counted].sum().item(), int(counted.sum())


@pytest.mark.parametrize("logits_at_once", [100, 1 << 25])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_losses_are_those_of_each_document_in_one_pass(make_model, monkeypatch, chunk, logits_at_once):
    monkeypatch.setattr(loss_module, "LOGITS_AT_ONCE", logits_at_once)
    model = make_model()
    generator = np.random.default_rng(0)
    documents = [(generator.integers(50, size=n), generator.random(n) < 0.7) for n in (9, 1, 30, 2, 0, 7, 30)]
    longest, hidden = [], model.hidden
    with monkeypatch.context() as patch:
        patch.setattr(model, "hidden", lambda idx, state: longest.append(idx.shape[1]) or hidden(idx, state))
        found = document_losses(model, documents, chunk)
    assert max(longest) <= chunk
    for (nll, count), (tokens, counted) in zip(found, documents):
        expected, n = direct(model, tokens.tolist(), counted.tolist())
        assert nll == pytest.approx(expected, rel=1e-10) and count == n


def test_loss_of_the_real_model_is_the_rwkv_packages(tiny, data, tmp_path, capsys):
    evaluate("loss", "--model", tiny, "--encoding", "utf-16-le", "--data", data / "eval_text_ascii.txt", "--out",
             tmp_path / "r.jsonl", "--count_end", 0)  # fmt: skip
    first, second, _ = capsys.readouterr().out.splitlines()
    assert first == f"loss 0.905476 nats per token, perplexity {math.exp(0.905476):.4f}, 2.6127 bits per byte"
    assert round(2 * 0.905476 / math.log(2), 4) == 2.6127  # two tokens to a letter
    assert "10,239 tokens of 1 document (10,240 tokens)" in second and "ends of document are left out" in second


@pytest.fixture
def pairs(tmp_path):
    """The same documents as jsonl and as binidx, with masks."""
    file = tmp_path / "pairs.jsonl"
    texts = [("Hi", "Hello"), ("Räksmörgås?", "Ja, gärna " * 5), ("1+1", "2")]
    file.write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in texts))
    documents = open_documents(file, tokenizer=BYTES)
    with BinidxWriter(tmp_path / "pairs", "uint16") as writer:
        for tokens, trained in (documents[i] for i in range(len(documents))):
            writer.add(tokens, trained)
    return file, tmp_path / "pairs", documents


def summary_of(out):
    return loss_module.summary(rows(out)[1:])


@pytest.mark.parametrize("mask", ["answer", "all"])
@pytest.mark.parametrize("count_end", [0, 1])
def test_jsonl_and_binidx_give_the_loss_of_what_is_trained(pairs, model_file, tmp_path, mask, count_end, capsys):
    model = load_model(model_file, torch.float64)
    cut = None if count_end else -1
    nll = count = 0
    for tokens, trained in (pairs[2][i] for i in range(3)):
        trained = trained.tolist() if mask == "answer" else [True] * len(trained)
        a, b = direct(model, tokens.tolist()[:cut], trained[:cut])
        nll, count = nll + a, count + b
    for file in pairs[:2]:
        out = tmp_path / "r.jsonl"
        evaluate("loss", "--model", model_file, "--dtype", "fp64", "--data", file, "--out", out, "--overwrite",
                 "--loss_mask", mask, "--count_end", count_end, "--batch_size", 2, "--chunk_len", 5)  # fmt: skip
        found = summary_of(out)
        assert found["loss"] == pytest.approx(nll / count, rel=1e-10) and found["counted"] == count
        assert found["perplexity"] == pytest.approx(math.exp(nll / count))
        texts = ("HiHello", "Räksmörgås?" + "Ja, gärna " * 4 + "Ja, gärna", "1+12")
        size = sum(len(f"User: \n\nAssistant: {text}".encode()) for text in texts)
        assert found["bits_per_byte"] == (
            None if mask == "answer" else pytest.approx(nll / count / math.log(2) * found["tokens"] / size)
        )
        assert ("trained tokens" in capsys.readouterr().out) == (mask == "answer")


def test_an_interrupted_loss_goes_on_and_ends_the_same(pairs, model_file, tmp_path, monkeypatch, capsys):
    outs = [tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"]
    command = ["loss", "--model", model_file, "--data", pairs[0], "--batch_size", 1, "--out"]
    evaluate(*command, outs[0])
    add, added = Results.add, []

    def tire(self, item):
        if len(added) == 2:
            raise KeyboardInterrupt
        added.append(item["id"])
        add(self, item)

    monkeypatch.setattr(Results, "add", tire)
    with pytest.raises(KeyboardInterrupt):
        evaluate(*command, outs[1])
    monkeypatch.setattr(Results, "add", lambda self, item: added.append(item["id"]) or add(self, item))
    assert "taken from" not in capsys.readouterr().err
    evaluate(*command, outs[1])
    assert f"2 items are taken from {outs[1]}; --overwrite starts anew\n" in capsys.readouterr().err
    assert sorted(added) == [0, 1, 2]
    assert sorted(outs[0].read_text().splitlines()) == sorted(outs[1].read_text().splitlines())


def test_binidx_of_an_unknown_vocabulary_needs_no_tokenizer(make_model, tmp_path, capsys):
    model = make_model(vocab_size=300, dtype=torch.float32)
    save_tensors(tmp_path / "m.pth", model.state_dict())
    with BinidxWriter(tmp_path / "d", "uint16") as writer:
        writer.add([5, 299, 7, 0])
    evaluate("loss", "--model", tmp_path / "m.pth", "--data", tmp_path / "d", "--count_end", 0)
    assert summary_of(tmp_path / "m.loss-d.jsonl")["counted"] == 2
    assert "bits" not in capsys.readouterr().out


def test_a_data_set_is_known_by_tokens_borders_and_masks():
    tokens = np.arange(6, dtype=np.uint16)
    variants = [
        Documents(tokens, [0, 3], [3, 3]),
        Documents(tokens, [0, 2], [2, 4]),
        Documents(tokens + 1, [0, 3], [3, 3]),
        Documents(tokens, [0, 3], [3, 3], np.array([1, 1, 1, 1, 1, 0], np.uint8)),
    ]
    assert len({loss_module.identity(documents) for documents in variants}) == 4


# ---------------------------------------------------------------- what is shown, and bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: gsm8k|math|loss"),
        (["gsm9k"], "gsm9k"),
        (["gsm8k", "--model", "M", "--data", "none.jsonl"], "none.jsonl: no such file"),
        (["gsm8k", "--model", "M", "--data", "D", "--shots", "3"], "--shots 3 needs --shots_data"),
        (["gsm8k", "--model", "M", "--data", "D", "--shots", "30", "--shots_data", "D"], "has only 9 problems"),
        (["gsm8k", "--model", "M", "--data", "D", "--max_tokens", "0"], "--max_tokens at least 1"),
        (["gsm8k", "--model", "M", "--data", "D", "--batch_size", "0"], "--batch_size 0"),
        (["gsm8k", "--model", "M", "--data", "D", "--fields", "question"], "wanted name=NAME_IN_THE_FILE"),
        (["math", "--model", "M", "--data", "D"], "line 1: wanted"),
        (["gsm8k", "--model", "M", "--data", "D", "--out", "/proc/none/r.jsonl"], "give another --out"),
        (["loss", "--model", "M", "--data", "none"], "none"),
        (["loss", "--model", "M", "--data", "D", "--chunk_len", "0"], "--chunk_len 0"),
        (["loss", "--model", "none.pth", "--data", "D"], "none.pth: no such file"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(gsm8k, model_file, capsys, arguments, message):
    arguments = [{"M": str(model_file), "D": str(gsm8k)}.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as end:
        run(lambda: main(arguments))
    captured = capsys.readouterr()
    assert end.value.code == 2 and captured.out == ""
    assert captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize(
    ("line", "message"),
    [("{", "line 2"), ("[]", "line 2: the line is a list"), ('{"question": "a", "answer": "b"}', "line 2: no question, or no")],
)
def test_a_broken_problem_is_told_by_its_line(gsm8k, tmp_path, line, message):
    first = gsm8k.read_text().splitlines()[0]
    gsm8k.write_text(f"{first}\n{line}\n")
    with pytest.raises(UserError, match=message):
        problems.read_problems(open_grader("math-verify", "gsm8k"), [str(gsm8k)], RowEncoder(BYTES), "answer")


def test_the_module_runs_as_a_program(tmp_path):
    done = program(["-m", "rwkv_bone.evaluate", "--help"], tmp_path)
    assert done.returncode == 0 and "gsm8k" in done.stdout and "loss" in done.stdout
