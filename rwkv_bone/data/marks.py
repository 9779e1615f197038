"""What RWKV-PEFT's loss masks `qa` and `se` train: the text between marks, found among a document's tokens."""

import numpy as np


def between_marks(tokens: np.ndarray, begin: list[int], end: list[int]) -> np.ndarray:
    """Which tokens (n,) follow a mark `begin`, up to the next mark `end` or the end of the document. bool (n,).

    begin, end: the marks' tokens. The marks themselves are not trained: the model is given them when it is asked. A document that
    holds no `begin` has no trained token (there, such a document trains as a whole, unsaid).
    """
    trained = np.zeros(len(tokens), bool)
    starts = [(int(i) + len(begin), True, int(i)) for i in found(tokens, begin)]
    stops = [(int(i) + len(end), False, int(i)) for i in found(tokens, end)]
    on, after = False, 0
    for reached, opens, at in sorted([*starts, *stops], key=lambda mark: mark[2]):
        if on:
            trained[after:at] = True
        on, after = opens, reached
    if on:
        trained[after:] = True
    return trained


def found(tokens: np.ndarray, mark: list[int]) -> np.ndarray:
    """Positions in `tokens` where `mark` begins."""
    if not mark or len(mark) > len(tokens):
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(tokens, len(mark))
    return np.flatnonzero((windows == np.asarray(mark)).all(1))
