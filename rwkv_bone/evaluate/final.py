r"""What a worked solution states as its final answer, and which texts are plain numbers.

A solution states its answer by \boxed{} or \fbox{}, by "####", or in words ("The answer is $3$", "**Answer:** 3"). The last
statement counts: a boxed answer that a later statement replaces is not the answer. Boxes with nothing but "and" or a comma
between them are one answer with several parts.
"""

import re
import unicodedata
from fractions import Fraction

from .original import braced

BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
BETWEEN_BOXES = re.compile(r"[\s$.]*(?:[,;]\s*(?:and)?|and|\\text\s*\{\s*and\s*\})[\s$]*")
HASHES = re.compile(r"####[ \t]*\n?[ \t]*([^\n]+)")
IN_WORDS = (
    r"(?:\b(?i:answer)(?: to [^.\n]{1,60}?| in [^.\n]{1,30}?)?[ *]{0,4}(?:\bis\b|=)"  # the answer is
    r"|^[ \t*#>]{0,9}(?i:final )?(?i:answer)[ *]{0,4}:)[ *]{0,4}:?[ *]{0,4}"  # **Final answer:**
)
# mathematics, a letter that chooses, or "x =": so neither "the answer is not 5" nor "the answer is correct"
MATHEMATICS = r"(?=[(\[{]*(?:[$\\\d+\-\u2212.]|[A-Z]\)?(?![A-Za-z'])(?! [a-z])|[a-z]\s*=))"
IN_MATHEMATICS = re.compile(IN_WORDS + MATHEMATICS + r"([^\n]+)", re.MULTILINE)
IN_ANY_WORDS = re.compile(IN_WORDS + r"(?!not\b)([^\n]+)", re.MULTILINE)
SENTENCE_END = re.compile(r"\.(?=\s|\*|$)|,? (?=(?:so|since|because|which|as|where|when|if)\b)")
SPAN = re.compile(r"(?<!\\)\$\$?(?!\s)([^$\n]+?)(?<![\s\\])\$\$?|\\\((.+?)\\\)|\\\[(.+?)\\\]")  # $...$, \(...\), \[...\]


def final_answer(text: str) -> str | None:
    """The content of the last statement of an answer; None where there is none, "" where there are only empty boxes."""
    stated = boxes(text)
    for pattern in (HASHES, IN_MATHEMATICS):
        stated += [(match.start(1), of_sentence(match[1])) for match in pattern.finditer(text)]
    if stated:
        return max((bool(content), place, content) for place, content in stated)[2]
    said = IN_ANY_WORDS.findall(text)
    return (of_sentence(said[-1]) or None) if said else None


def boxes(text: str) -> list[tuple[int, str]]:
    """(place, content) of the last boxes, parts of one answer joined. A box that was never closed ends with its line."""
    found: list[tuple[int, str]] = []
    end = None  # of the box before
    for match in list(BOX.finditer(text))[-50:]:
        if end is not None and match.start() < end:
            continue  # a box within a box
        rest = text[match.end() :]
        if rest.startswith("{"):
            closed = braced(rest)
            content = rest[1:].split("\n")[0].rstrip("$. ") if closed is None else closed
            after = match.end() + 1 + len(content)
        else:
            bare = re.match(r"[+-]?\d[\d.,]*(?<=\d)|\\?[A-Za-z]+", rest)  # \boxed 9
            content = bare[0] if bare else ""
            after = match.end() + len(content)
        content = BOX.sub("", content)
        if found and end is not None and BETWEEN_BOXES.fullmatch(text[end : match.start()].removeprefix("}")):
            found[-1] = (match.start(), f"{found[-1][1]}, {content.strip()}")
        else:
            found.append((match.start(), content.strip()))
        end = after
    return found


def of_sentence(text: str) -> str:
    """The answer in a rest of a line that states it: a number with its unit, or the formulas, or else the words."""
    if BOX.search(text):
        return ""  # `boxes` reads it
    first = SENTENCE_END.split(text)[0].strip(" *\t")
    formulas = [next(filter(None, match.groups())) for match in SPAN.finditer(text) if match.start() <= len(first)]
    worded = re.match(r"[+\-\u2212]?[\d.]", first) or not formulas
    return first.strip(" *$\t").rstrip(",;:!?") if worded else ", ".join(formulas)


# ---------------------------------------------------------------- numbers

WHOLE = r"(?:\d{1,3}(?:,\d\d)*(?:,\d{3})+(?![\d,])|\d{1,3}(?: \d{3})+(?!\d)|\d+)"  # 1234, 1,234, 1 234, 12,34,567
POWER = r"(?:[eE][+-]?\d{1,3}(?!\d)|\s*(?:\\times|\\cdot|×|x|\*)\s*10\s*\^\s*(?:\{\s*[+-]?\d{1,3}\s*\}|[+-]?\d{1,3}(?!\d)))"
SIMPLE = rf"(?:{WHOLE}(?:\.\d+|\.(?!\w))?|\.\d+){POWER}?"
# a minus after a word or a bracket subtracts; 1 1/2 is a mixed number
NUMBER = re.compile(
    rf"(?:(?<![\w)}}])(?P<sign>[+-])\s*)?(?:(?P<whole>\d+)\s+(?=\d+\s*/\s*\d))?(?P<over>{SIMPLE})(?:\s*/\s*(?P<under>{SIMPLE}))?"
)
FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))")


def tidy(text: str) -> str:
    r"""An answer without what only shapes its look: thin spaces, bold, dollars, a full stop. ½ becomes 1/2, −1 becomes -1."""
    text = re.sub("[¼-¾⅐-⅞]", lambda vulgar: " " + unicodedata.normalize("NFKC", vulgar[0]).replace("\u2044", "/"), text)
    text = text.replace("\u2212", "-").replace("{,}", ",").replace(r"\!", "").replace(r"\$", "").replace("**", "")
    text = re.sub(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", "", text)  # 1\,234
    return re.sub(r"(?<=\w)\.$", "", text.strip().strip("$").strip())


def flat(text: str) -> str:
    return FRACTION.sub(r" \1\2/\3\4 ", tidy(text)).replace("$", "")


def number_in(text: str) -> re.Match | None:
    r"""The first number of a text, for `value`: -1,234.50, 1.2e3, 1.2 \times 10^3, 3/4, \frac34, 1 1/2."""
    return NUMBER.search(flat(text))


def last_number_in(text: str) -> re.Match | None:
    return next(iter(reversed(list(NUMBER.finditer(flat(text))))), None)


def value(found: re.Match) -> Fraction | None:
    """Of what `number_in` found; None for a division by 0, or a number of thousands of digits."""
    try:
        size = int(found["whole"] or 0) + simple(found["over"]) / (simple(found["under"]) if found["under"] else 1)
    except (ZeroDivisionError, ValueError):
        return None
    return -size if found["sign"] == "-" else size


def simple(text: str) -> Fraction:
    mantissa, *power = re.split(r"[eE]|\s*(?:\\times|\\cdot|×|x|\*)\s*10\s*\^", re.sub(r"[ ,](?=\d)", "", text))
    return Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(power[0].strip("{} ") if power else 0)
