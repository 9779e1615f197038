"""`--show_batch`: what is shown as trained is what has a target, and padding is not shown."""

import numpy as np
import torch

from rwkv_bone.data.documents import Documents
from rwkv_bone.data.tokenizer import ByteTokenizer
from rwkv_bone.training.show import show_batch, show_document

BYTES = ByteTokenizer(257)


def batch(*rows):
    width = max(len(idx) for idx, _ in rows)
    idx = torch.zeros(len(rows), width, dtype=torch.long)
    targets = torch.full((len(rows), width), -100)
    for b, (text, trained) in enumerate(rows):
        tokens = torch.tensor(ByteTokenizer(257).encode(text))
        idx[b, : len(tokens) - 1] = tokens[:-1]
        for i in trained:
            targets[b, i - 1] = tokens[i]
    return {"idx": idx, "targets": targets}


def test_trained_text_is_marked_and_padding_left_out():
    shown = show_batch(batch(("Q: a A: bc", range(7, 10)), ("xyz", range(1, 3))), ByteTokenizer(257), colour=False)
    assert shown == "--- row 1: 10 tokens, 3 trained\nQ: a A:[[ bc]]\n--- row 2: 3 tokens, 2 trained\nx[[yz]]"


def test_on_a_terminal_the_mark_is_green():
    shown = show_batch(batch(("ab", [1])), ByteTokenizer(257), colour=True)
    assert shown.endswith("a\x1b[32mb\x1b[0m")


def test_a_character_of_two_bytes_is_not_cut():
    tokens = torch.tensor(ByteTokenizer(256, "utf-16-le").encode("abc"))
    micro = {"idx": tokens[None, :-1], "targets": tokens[None, 1:].clone()}
    shown = show_batch(micro, ByteTokenizer(256, "utf-16-le"), colour=False)
    assert shown.endswith("\na[[bc]]")


def test_the_first_document_is_shown_and_another_tokenizers_tokens_are_told():
    tokens = np.array([*BYTES.encode("Q: a A: b"), 0, *BYTES.encode("next")])
    mask = np.zeros(len(tokens), np.uint8)
    mask[7:10] = 1
    documents = Documents(tokens, [0, 10], [10, 4], mask)
    assert show_document(documents, BYTES, colour=False)[1:-1] == ["Q: a A:[[ b]]"]
    cut = show_document(documents, BYTES, colour=False, limit=4)
    assert "10 tokens, of which 4 are shown" in cut[0] and cut[1:-1] == ["Q: a"]
    strange = Documents(np.array([200, 201, 202, 65]), [0], [4])
    assert "another tokenizer" in show_document(strange, BYTES, colour=False)[-2]
