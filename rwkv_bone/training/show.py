"""One batch as a person reads it: the text of each row, what is trained marked (`--show_batch`)."""

import sys

from torch import Tensor

from ..data.tokenizer import Tokenizer

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def show_batch(micro: dict[str, Tensor], tokenizer: Tokenizer, colour: bool | None = None) -> str:
    """The rows of a micro batch, one paragraph each; trained text is green, or between [[ and ]] where there is no colour.

    A token is trained where it is a target: the first token of a document never is. Padding and separators are left out.
    """
    colour = sys.stdout.isatty() if colour is None else colour
    opening, closing = (GREEN, PLAIN) if colour else ("[[", "]]")
    rows = []
    for number, (idx, targets) in enumerate(zip(micro["idx"].tolist(), micro["targets"].tolist())):
        trained = [t >= 0 for t in targets]
        last = max((i for i, token in enumerate(idx) if token or trained[i]), default=-1)
        tokens = [idx[0], *(t if on else following for t, on, following in zip(targets, trained, [*idx[1:], 0]))][: last + 2]
        marks = [False, *trained][: last + 2]
        text, start = "", 0
        for i in range(1, len(tokens) + 1):
            # a border inside a character moves to the character's end
            if i == len(tokens) or (marks[i] != marks[start] and not tokenizer.decode(tokens[start:i]).endswith("\ufffd")):
                piece = tokenizer.decode(tokens[start:i])
                text += f"{opening}{piece}{closing}" if marks[start] else piece
                start = i
        count = sum(trained)
        rows.append(f"--- row {number + 1}: {len(tokens)} tokens, {count} trained\n{text}")
    return "\n".join(rows)
