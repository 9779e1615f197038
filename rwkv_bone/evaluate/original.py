r"""Is the answer right? What counts as the final answer of a worked solution, and which answers are the same.

GSM8K (arXiv 2110.14168): the number after "####", as its solutions end; else the last number of the text. Numbers are compared
as numbers: 1,234 and $1234.00 are the same.

MATH (arXiv 2103.03874): the content of the last \boxed{} or \fbox{}; where there is none, what follows the last "The answer is"
(so MetaMathQA's solutions end). Two answers are the same if they agree in the form to which that paper's grader brings them;
its rules, their order and their limits (it does no algebra) are kept, so that accuracies can be compared with published ones.
"""

import re
from decimal import Decimal

MARKED = re.compile(r"####\s*([-$\s]*)([\d,]*\.?\d+)")
# thousands in threes, so that "3,4" is two numbers; a minus after a word or a bracket subtracts
NUMBER = re.compile(r"((?<![\w)])-)?\$?((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")


def gsm8k_answer(text: str) -> Decimal | None:
    """The final number of a solution, or None if there is no number."""
    text = text.replace("\u2212", "-")
    found = MARKED.search(text) or next(iter(reversed(list(NUMBER.finditer(text)))), None)
    if found is None:
        return None
    return Decimal(("-" if "-" in (found[1] or "") else "") + found[2].replace(",", ""))


def math_answer(text: str) -> str | None:
    r"""The final answer of a solution, as it stands in its last \boxed{}; None if there is none, or it was not closed."""
    starts = [match.end() for match in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])", text)]
    if not starts:
        said = re.findall(r"[Tt]he answer is:?[ \t]*([^\n]+)", text)
        return said[-1].strip().removesuffix(".").strip().strip("$").strip() or None if said else None
    rest = text[starts[-1] :].lstrip()
    if rest.startswith("{"):
        return braced(rest)
    bare = re.match(r"[+-]?\d[\d.,]*(?<=\d)|\\?[A-Za-z]+", rest)  # \boxed 9
    return bare[0] if bare else None


def braced(text: str) -> str | None:
    """What stands between the brace that `text` begins with and the one that closes it; None if none does."""
    depth = 0
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are no braces
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[1 : match.start()]
    return None


def math_equal(a: str, b: str) -> bool:
    """Whether two answers are the same to the grader of MATH."""
    normal_a, normal_b = normal_form(a), normal_form(b)
    return a == b if normal_a is None or normal_b is None else normal_a == normal_b


def normal_form(answer: str) -> str | None:
    """An answer as the grader of MATH compares it; None for one that it cannot take apart."""
    for old, new in (
        ("\n", ""),
        (r"\!", ""),
        ("\\\\", "\\"),
        ("tfrac", "frac"),
        ("dfrac", "frac"),
        (r"\left", ""),
        (r"\right", ""),
        (r"^{\circ}", ""),
        (r"^\circ", ""),
        (r"\$", ""),
    ):
        answer = answer.replace(old, new)
    answer, *units = answer.split(r"\text{ ")  # a text that begins with a space is a unit
    if len(units) > 1:
        return None
    answer = answer.replace(r"\%", "").replace(" .", " 0.").replace("{.", "{0.")
    if answer.startswith("."):
        answer = "0" + answer
    left, equals, right = answer.partition("=")
    if equals and "=" not in right and len(left) <= 2:  # x = 5
        answer = right
    head, *pieces = answer.split(r"\sqrt")
    if "" in pieces:
        return None
    answer = head + "".join(r"\sqrt" + (piece if piece[0] == "{" else f"{{{piece[0]}}}{piece[1:]}") for piece in pieces)
    answer = answer.replace(" ", "")
    head, *pieces = answer.split(r"\frac")
    short = next((piece for piece in pieces if len(piece) < 2 and piece != "{"), None)
    if short == "":
        return None
    if short is None:
        answer = head + "".join(r"\frac" + with_braces(piece) for piece in pieces)
    if answer == "0.5":
        return r"\frac{1}{2}"
    return re.sub(r"\A(0|-?[1-9]\d*)/(0|-?[1-9]\d*)\Z", r"\\frac{\1}{\2}", answer)


def with_braces(arguments: str) -> str:
    r"""What follows \frac, its two arguments in braces: 12 -> {1}{2}, 1{72} -> {1}{72}. (A second one bare is left: {72}1.)"""
    if arguments[0] == "{":
        return arguments
    first, second, rest = arguments[0], arguments[1], arguments[2:]
    return f"{{{first}}}" + (second if second == "{" else f"{{{second}}}") + rest
