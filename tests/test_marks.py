"""RWKV-PEFT's masks qa and se: the text between marks is trained."""

import numpy as np
import pytest

from rwkv_bone.data.marks import between_marks


@pytest.mark.parametrize(
    "text, trained",
    [
        ("User: hi\n\nAssistant: yes\n\nUser: so?\n\nAssistant: no", " yes\n\n no"),
        ("Assistant: a", " a"),
        ("Assistant: a Assistant: b", " a  b"),
        ("nothing here", ""),
        ("User: only", ""),
        ("", ""),
        ("Assistant:", ""),
    ],
)
def test_what_follows_the_first_mark_is_trained_up_to_the_second(text, trained):
    tokens = np.frombuffer(text.encode(), np.uint8)
    mask = between_marks(tokens, list(b"Assistant:"), list(b"User:"))
    assert bytes(tokens[mask]).decode() == trained and mask.dtype == bool and mask.shape == tokens.shape
