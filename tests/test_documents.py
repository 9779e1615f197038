"""Documents: the same from every kind of file, and checked against the vocabulary before anything is trained."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_bone.data import documents as module
from rwkv_bone.data.binidx import BinidxWriter
from rwkv_bone.data.documents import Documents, open_documents
from rwkv_bone.data.encode import RowEncoder
from rwkv_bone.data.files import BEGINNING, Batch
from rwkv_bone.data.jsonl_to_binidx import convert
from rwkv_bone.data.tokenizer import ByteTokenizer
from rwkv_bone.errors import UserError

SHARED = Path(__file__).parents[1] / "../shared/data"
BYTES = ByteTokenizer(257)
ROWS = [{"text": "ab"}, {"question": "q", "answer": "a"}, {"text": ""}, {"messages": [
    {"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]}]  # fmt: skip


def write_rows(path, content=ROWS):
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    return path


def as_lists(documents):
    return [tuple(part.tolist() for part in documents[i]) for i in range(len(documents))]


def test_jsonl_and_the_binidx_made_of_it_are_the_same_documents(tmp_path):
    path = write_rows(tmp_path / "x.jsonl")
    convert(path, tmp_path / "x", RowEncoder(BYTES))
    from_jsonl = open_documents(path, tokenizer=BYTES)
    from_binidx = open_documents(tmp_path / "x", vocab_size=257)
    assert as_lists(from_jsonl) == as_lists(from_binidx) and len(from_jsonl) == 3 and from_jsonl.tally.skipped == 1
    done = RowEncoder(BYTES).encode(Batch("x", "line", 1, ROWS, 0, BEGINNING))
    assert done.tokens.tolist() == from_jsonl.tokens.tolist() and done.mask.tolist() == from_jsonl.mask.tolist()
    assert from_jsonl.total_tokens == from_binidx.total_tokens == sum(len(tokens) for tokens, _ in as_lists(from_jsonl))


def test_loss_mask_all_trains_everything_from_either(tmp_path):
    path = write_rows(tmp_path / "x.jsonl")
    convert(path, tmp_path / "x", RowEncoder(BYTES))
    for data_file in (path, tmp_path / "x"):
        for mask in ("all", "pad"):
            assert all(all(mask) for _, mask in as_lists(open_documents(data_file, tokenizer=BYTES, loss_mask=mask)))


def test_several_jsonl_files_by_commas_lists_and_globs(tmp_path):
    a, b = (write_rows(tmp_path / name, [{"text": name}]) for name in ("a.jsonl", "b.jsonl"))
    wanted = as_lists(open_documents([a, b], tokenizer=BYTES))
    assert [BYTES.decode(tokens) for tokens, _ in wanted] == ["a.jsonl", "b.jsonl"]
    assert as_lists(open_documents(f"{a},{b}", tokenizer=BYTES)) == wanted
    assert as_lists(open_documents(str(tmp_path / "*.jsonl"), tokenizer=BYTES)) == wanted


def test_numpy_and_text_are_one_document(tmp_path):
    np.save(tmp_path / "x.npy", np.array([3, 0, 5], np.uint16))
    assert as_lists(open_documents(tmp_path / "x.npy", vocab_size=6)) == [([3, 0, 5], [True] * 3)]
    (tmp_path / "x.txt").write_bytes("a\r\né".encode())
    (tokens, mask), = as_lists(open_documents(tmp_path / "x.txt", tokenizer=BYTES))
    assert tokens == [*BYTES.encode("a\r\né"), 0] and all(mask)


@given(st.binary(max_size=80) | st.binary(max_size=60).map(lambda b: b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', " + b))
def test_a_damaged_npy_is_one_line(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("n") / "x.npy"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npy") as caught:
        open_documents(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["uint16", "int32", "int64"])
@pytest.mark.parametrize("bad", [700, -3])
def test_a_token_outside_the_vocabulary_is_named(tmp_path, monkeypatch, kind, bad):
    monkeypatch.setattr(module, "BLOCK", 3)
    tokens = [[1, 2], [3, 4, 5, 699], [6, bad % 65536 if kind == "uint16" else bad, 8]]
    documents = Documents(np.concatenate(tokens).astype(kind), [0, 2, 6], [2, 4, 3], name="x")
    with pytest.raises(UserError, match=rf"x: document 2, token 1 is {tokens[2][1]}, but the vocabulary is 0 to 699"):
        documents.check_vocabulary(700)
    if tokens[2][1] > 0:
        documents.check_vocabulary(tokens[2][1] + 1)


def test_tokens_in_floating_point_must_be_whole_numbers():
    documents = Documents(np.array([1.0, 2.0, 3.0]), [0], [3])
    documents.check_vocabulary(4)
    assert as_lists(documents)[0][0] == [1, 2, 3]
    for bad in (1.5, np.nan, np.inf, -1.0):
        with pytest.raises(UserError, match="document 0, token 1"):
            Documents(np.array([1.0, bad, 3.0]), [0], [3]).check_vocabulary(4)


def test_a_full_uint16_vocabulary_needs_no_reading():
    class Unread(np.ndarray):
        def __getitem__(self, key):
            raise AssertionError("read")

    Documents(np.zeros(9, np.uint16).view(Unread), [0], [9]).check_vocabulary(65536)


def test_opening_checks_the_vocabulary(tmp_path):
    with BinidxWriter(tmp_path / "x") as writer:
        writer.add([1, 256])
    open_documents(tmp_path / "x", vocab_size=257)
    with pytest.raises(UserError, match="document 0, token 1 is 256, but the vocabulary is 0 to 255"):
        open_documents(tmp_path / "x", vocab_size=256)
    with pytest.raises(UserError, match="is 256, but"):
        open_documents(tmp_path / "x", tokenizer=ByteTokenizer(256))


@pytest.mark.parametrize("data_file, options, message", [
    ("", {}, "--data_file is missing"),
    ([], {}, "--data_file is missing"),
    ("none", {}, "cannot read none.idx"),
    ("none.jsonl", {"tokenizer": BYTES}, "none.jsonl: no such file"),
    ("none.npy", {}, "cannot read none.npy"),
    ("none.txt", {"tokenizer": BYTES}, "none.txt: no such file"),
    ("x.jsonl", {}, "jsonl data need a tokenizer"),
    ("x.jsonl", {"data_type": "sft"}, "'sft' is not known; choose from binidx, jsonl"),
    ("a.txt,b.jsonl", {}, "are of several kinds"),
    ("a,b", {}, "binidx data are one file, not 2"),
    ("x", {"loss_mask": "qa"}, "'qa' is not known"),
])  # fmt: skip
def test_mistakes_are_one_line(data_file, options, message):
    with pytest.raises(UserError, match=message):
        open_documents(data_file, **options)


def test_empty_files_are_named(tmp_path):
    write_rows(tmp_path / "x.jsonl", [{"text": ""}])
    with pytest.raises(UserError, match=r"x\.jsonl: no document; left out: 1 empty texts"):
        open_documents(tmp_path / "x.jsonl", tokenizer=BYTES)
    (tmp_path / "x.txt").touch()
    with pytest.raises(UserError, match=r"x\.txt is empty"):
        open_documents(tmp_path / "x.txt", tokenizer=BYTES)
    (tmp_path / "x.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"x\.txt: byte 0 is no UTF-8"):
        open_documents(tmp_path / "x.txt", tokenizer=BYTES)


def test_a_folder_a_list_of_texts_and_a_prefix_without_its_ending_are_found(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / f"texts/{name}.txt").write_text(name)
    wanted = [([98, 0], [True] * 2), ([99, 0], [True] * 2)]
    for data_file in (tmp_path / "texts", f"{tmp_path}/texts/a.txt,{tmp_path}/texts/b.txt", f"{tmp_path}/texts/*.txt"):
        assert as_lists(open_documents(data_file, tokenizer=BYTES)) == wanted
    convert(tmp_path / "texts", tmp_path / "made/x_text_document", RowEncoder(BYTES))
    for data_file in (tmp_path / "made/x", tmp_path / "made", tmp_path / "made/x_text_document.bin"):
        assert as_lists(open_documents(data_file)) == wanted


def test_json_given_as_text_is_refused_with_the_cure(tmp_path):
    path = write_rows(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match=r"holds JSON objects.*give --data_type jsonl"):
        open_documents(path, "utf-8", BYTES)
    path.rename(tmp_path / "x.txt")
    named_txt, named_jsonl = (open_documents(p, "jsonl", BYTES) for p in (tmp_path / "x.txt", write_rows(path)))
    assert as_lists(named_txt) == as_lists(named_jsonl)


def test_documents_survive_pickling_and_binidx_stays_on_disk(tmp_path):
    path = write_rows(tmp_path / "x.jsonl", [{"question": "q" * 20000, "answer": "a"}])
    convert(path, tmp_path / "x", RowEncoder(BYTES))
    for documents in (open_documents(path, tokenizer=BYTES), open_documents(tmp_path / "x")):
        packed = pickle.dumps(documents)
        assert as_lists(pickle.loads(packed)) == as_lists(documents)
    assert len(packed) < 1000


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared/data")
def test_golden_binidx_as_documents():
    wanted = json.loads((SHARED / "binidx/expected.json").read_text())["sample.make_data.uint16"]["docs"]
    documents = open_documents(SHARED / "binidx/sample.make_data.uint16", "binidx", vocab_size=65536)
    assert [tokens for tokens, _ in as_lists(documents)] == wanted and all(all(mask) for _, mask in as_lists(documents))
    assert documents[0][0].dtype == np.int64 and documents[0][1].dtype == bool
    with pytest.raises(IndexError):
        documents[7]
