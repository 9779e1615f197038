"""Training text as a person reads it, what is trained marked: one batch (`--show_batch`), or the first document (`--dry_run`)."""

import sys
from collections.abc import Sequence

from torch import Tensor

from ..data.documents import Documents
from ..data.tokenizer import UNKNOWN, Tokenizer
from ..terminal import counted

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show_batch(micro: dict[str, Tensor], tokenizer: Tokenizer, colour: bool | None = None) -> str:
    """The rows of a micro batch, one paragraph each; trained text is green, or between [[ and ]] where there is no colour.

    A token is trained where it is a target: the first token of a document never is. Padding and separators are left out.
    """
    rows = []
    for number, (idx, targets) in enumerate(zip(micro["idx"].tolist(), micro["targets"].tolist())):
        trained = [t >= 0 for t in targets]
        last = max((i for i, token in enumerate(idx) if token or trained[i]), default=-1)
        tokens = [idx[0], *(t if on else following for t, on, following in zip(targets, trained, [*idx[1:], 0]))][: last + 2]
        text = marked(tokens, [False, *trained][: last + 2], tokenizer, colour)
        rows.append(f"--- row {number + 1}: {counted(len(tokens), 'token')}, {sum(trained)} trained\n{text}")
    return "\n".join(rows)


def show_document(documents: Documents, tokenizer: Tokenizer, colour: bool | None = None, limit: int = 400) -> list[str]:
    """Lines with the first `limit` tokens of the first document; a warning where they are not text of this tokenizer."""
    tokens, trained = documents.span(int(documents.starts[0]), min(int(documents.sizes[0]), limit))
    more = f", of which {limit} are shown" if documents.sizes[0] > limit else ""
    lines = [f"--- the first document, {counted(int(documents.sizes[0]), 'token')}{more}; trained text is marked"]
    lines += marked(tokens.tolist(), trained.tolist(), tokenizer, colour).split("\n")
    shown = tokenizer.decode(tokens.tolist())
    if shown.count(UNKNOWN) > len(shown) / 4:
        lines.append(f"warning: this is mostly not text: the data were made with another tokenizer than {tokenizer}")
    return [*lines, "---"]


def marked(tokens: Sequence[int], trained: Sequence[bool], tokenizer: Tokenizer, colour: bool | None) -> str:
    """The text of tokens, trained stretches green, or between [[ and ]]."""
    colour = sys.stdout.isatty() if colour is None else colour
    opening, closing = (GREEN, PLAIN) if colour else ("[[", "]]")
    text, start = "", 0
    for i in range(1, len(tokens) + 1):
        # a border inside a character moves to the character's end
        if i == len(tokens) or (trained[i] != trained[start] and not tokenizer.decode(tokens[start:i]).endswith(UNKNOWN)):
            piece = tokenizer.decode(tokens[start:i])
            text += f"{opening}{piece}{closing}" if trained[start] else piece
            start = i
    return text
