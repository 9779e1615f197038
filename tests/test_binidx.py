"""binidx: equal to the community's files byte for byte, and nothing but one-line errors from damaged ones."""

import contextlib
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rwkv_bone.data import binidx
from rwkv_bone.data.binidx import HEADER, MAGIC, BinidxDocuments, BinidxWriter
from rwkv_bone.data.documents import Documents
from rwkv_bone.errors import UserError

GOLDEN = Path(__file__).parents[1] / "../shared/data/binidx"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/data/binidx, files made by the community's tools")
PAIRS = {
    "sample_text_document.int32": "int32",
    "unicode_text_document.int32": "int32",
    "sample.make_data.uint16": "uint16",
    "shipped_20B_sample.uint16": "uint16",
}


def write(prefix, documents, dtype="uint16", masks=None, **options):
    with BinidxWriter(prefix, dtype, **options) as writer:
        for i, tokens in enumerate(documents):
            writer.add(tokens, None if masks is None else masks[i])


def build(n=3, n_doc=None, version=1, code=8, magic=MAGIC, sizes=(2, 1, 3), offsets=(0, 4, 6), borders=(0, 1, 2, 3)):
    """An index by hand, so that any field can be wrong."""
    head = HEADER.pack(magic, version, code, n, len(borders) if n_doc is None else n_doc)
    return head + np.array(sizes, "<i4").tobytes() + np.array(offsets, "<i8").tobytes() + np.array(borders, "<i8").tobytes()


def open_pair(folder, index, data=bytes(12), mask=None):
    (folder / "x.idx").write_bytes(index)
    (folder / "x.bin").write_bytes(data)
    (folder / "x.mask.bin").unlink(missing_ok=True)
    if mask is not None:
        (folder / "x.mask.bin").write_bytes(mask)
    return BinidxDocuments(folder / "x")


@golden
@pytest.mark.parametrize("name", PAIRS)
def test_golden_documents_are_read_token_for_token(name):
    wanted = json.loads((GOLDEN / "expected.json").read_text())[name]
    docs = BinidxDocuments(GOLDEN / name)
    assert [docs[i].tolist() for i in range(len(docs))] == wanted["docs"]
    assert docs.dtype.name == PAIRS[name]
    assert docs.doc_idx.tolist() == wanted["doc_idx"] and len(docs) == wanted["n"]
    assert docs.total_tokens == sum(map(len, wanted["docs"])) and docs.sizes.tolist() == list(map(len, wanted["docs"]))


@golden
@pytest.mark.parametrize("name", PAIRS)
def test_golden_files_are_written_byte_for_byte(name, tmp_path):
    wanted = json.loads((GOLDEN / "expected.json").read_text())[name]
    write(tmp_path / "copy", wanted["docs"], PAIRS[name])
    for end in (".bin", ".idx"):
        assert (tmp_path / f"copy{end}").read_bytes() == (GOLDEN / f"{name}{end}").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["copy.bin", "copy.idx"]


documents = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=9)


@given(documents, st.sampled_from(["uint16", "int32", "int64"]), st.data())
def test_documents_and_masks_survive_writing(tmp_path_factory, docs, dtype, data):
    prefix = tmp_path_factory.mktemp("w") / "x"
    masks = [data.draw(st.none() | st.lists(st.booleans(), min_size=len(d), max_size=len(d))) for d in docs]
    write(prefix, docs, dtype, masks)
    back = BinidxDocuments(prefix)
    assert [back[i].tolist() for i in range(len(back))] == docs and back.dtype.name == dtype
    full = [[True] * len(d) if m is None else m for d, m in zip(docs, masks)]
    assert [trained.tolist() for _, trained in Documents.from_binidx(prefix)] == full
    assert (back.mask is None) == all(map(all, full))


def test_many_documents_at_once_equal_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(binidx, "BLOCK", 4)  # the same arithmetic, over several blocks
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 7, 23)
    tokens, mask = rng.integers(0, 100, sizes.sum()), rng.integers(0, 2, sizes.sum())
    with BinidxWriter(tmp_path / "many", "int32") as writer:
        writer.extend(tokens[: sizes[0]], sizes[:1])
        writer.extend(tokens[sizes[0] :], sizes[1:], mask[sizes[0] :])
    mask[: sizes[0]] = 1
    cuts = np.cumsum(sizes)[:-1]
    write(tmp_path / "one", np.split(tokens, cuts), "int32", np.split(mask, cuts))
    for end in (".bin", ".idx", ".mask.bin"):
        assert (tmp_path / f"many{end}").read_bytes() == (tmp_path / f"one{end}").read_bytes()
    assert np.array_equal(BinidxDocuments(tmp_path / "many").starts, np.cumsum(sizes) - sizes)
    assert writer.trained_tokens == mask.sum() and writer.total_tokens == len(mask)


@pytest.mark.parametrize("code, name", binidx.DTYPES.items())
def test_every_dtype_code_is_read(tmp_path, code, name):
    data = np.array([1, 2, 3, 4, 5, 6], name)
    docs = open_pair(tmp_path, build(code=code, offsets=np.array([0, 2, 3]) * data.itemsize), data.tobytes())
    assert docs[2].tolist() == [4, 5, 6] and docs[-1].tolist() == [4, 5, 6] and docs.dtype == np.dtype(name)


def test_the_suffix_may_be_given(tmp_path):
    write(tmp_path / "x", [[1, 2]])
    for path in ("x", "x.bin", "x.idx"):
        assert BinidxDocuments(tmp_path / path)[0].tolist() == [1, 2]


def test_permuted_and_empty_documents_are_read(tmp_path):
    data = np.arange(6, dtype="<u2").tobytes()
    docs = open_pair(tmp_path, build(sizes=(3, 0, 3), offsets=(6, 12, 0)), data)
    assert [docs[i].tolist() for i in range(3)] == [[3, 4, 5], [], [0, 1, 2]]
    with pytest.raises(IndexError):
        docs[3]


def test_sequences_are_documents_where_doc_idx_groups_or_repeats(tmp_path):
    for borders in ((0, 2, 2, 3), (0, 3)):
        assert len(open_pair(tmp_path, build(borders=borders))) == 3


def test_a_pickled_reader_maps_the_files_again(tmp_path):
    write(tmp_path / "x", [np.arange(50000)], "int32")
    packed = pickle.dumps(BinidxDocuments(tmp_path / "x"))
    assert len(packed) < 1000 and pickle.loads(packed)[0].tolist() == list(range(50000))


BROKEN = {
    "no binidx": dict(index=build(magic=b"MMIDIDX\x00\x01")),
    "ends within its header": dict(index=build()[:33]),
    "within its header": dict(index=b"MM"),
    "version 2": dict(index=build(version=2)),
    "dtype code 9": dict(index=build(code=9)),
    "dtype code 0": dict(index=build(code=0)),
    "truncated or damaged": dict(index=build()[:-1]),
    "or damaged": dict(index=build() + b"\0"),
    "and 4 borders take": dict(index=build(n=2**63)),
    "take": dict(index=build(n_doc=2**64 - 1)),
    "holds no document": dict(index=build(n=0, sizes=(), offsets=(), borders=(0,))),
    "x.idx is empty": dict(index=b""),
    "x.bin is empty": dict(index=build(), data=b""),
    r"document 1 \(-1 tokens": dict(index=build(sizes=(2, -1, 3))),
    r"document 2 \(3 tokens at byte 8\)": dict(index=build(offsets=(0, 4, 8))),
    r"at byte -2\)": dict(index=build(offsets=(0, -2, 6))),
    r"at byte 5\)": dict(index=build(offsets=(0, 5, 6))),
    r"at byte 9223372036854775806\)": dict(index=build(offsets=(0, 4, 2**63 - 2))),
    r"inside .*x.bin \(11 bytes\)": dict(index=build(), data=bytes(11)),
    "not a pair": dict(index=build(), data=bytes(14)),
    "doc_idx does not rise from 0 to 3": dict(index=build(borders=(0, 2, 1, 3))),
    "doc_idx does not rise": dict(index=build(borders=(1, 1, 2, 3))),
    "doc_idx does not": dict(index=build(borders=(0, 1, 2, 4))),
    "doc_idx does": dict(index=build(borders=())),
    "doc_idx": dict(index=build(borders=(0, 2**63 - 1, -(2**63), 3))),
    "5 bytes for 6 tokens": dict(index=build(), mask=b"\1" * 5),
    "other than 0 and 1": dict(index=build(), mask=b"\1\0\1\2\0\1"),
}


@pytest.mark.parametrize("message", BROKEN)
def test_each_defect_is_named_in_one_line(tmp_path, message):
    with pytest.raises(UserError, match=message) as caught:
        open_pair(tmp_path, **BROKEN[message])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*x\.idx: No such file"):
        BinidxDocuments(tmp_path / "x")
    (tmp_path / "x.idx").write_bytes(build())
    with pytest.raises(UserError, match=r"cannot read .*x\.bin: No such file"):
        BinidxDocuments(tmp_path / "x")
    (tmp_path / "x.bin").mkdir()
    with pytest.raises(UserError, match=r"x\.bin is not a file"):
        BinidxDocuments(tmp_path / "x")


edits = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 120), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("cut"), st.integers(0, 120), st.just(b"")),
        st.tuples(st.just("add"), st.integers(0, 120), st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("set"), st.sampled_from([9, 17, 18, 26, 34, 38, 46, 54, 62, 70, 78, 86]),
                  st.sampled_from([b"\xff" * 8, b"\0" * 8, b"\xff" * 7 + b"\x7f", b"\x80", b"\1\0\0\0", b"\2"])),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def damage(content: bytes, changes) -> bytes:
    for kind, at, new in changes:
        content = content[:at] if kind == "cut" else content[:at] + new + content[at + (len(new) if kind == "set" else 0) :]
    return content


@settings(max_examples=400, deadline=2000)
@given(edits, st.sampled_from(["idx", "bin", "mask", "idx", "idx and bin"]))
def test_damaged_files_give_documents_or_a_user_error(tmp_path_factory, changes, where):
    folder = tmp_path_factory.mktemp("f")
    index, data, mask = build(), np.arange(6, dtype="<u2").tobytes(), b"\1\0\1\1\0\1"
    index = damage(index, changes) if "idx" in where else index
    data = damage(data, changes) if "bin" in where else data
    mask = damage(mask, changes) if where == "mask" else mask
    tracemalloc.start()
    try:
        docs = open_pair(folder, index, data, mask)
        for i in range(len(docs)):
            assert len(docs[i]) == docs.sizes[i]
        assert docs.mask is None or len(docs.mask) == len(docs.tokens)
        assert docs.total_tokens <= len(docs) * len(docs.tokens)
    except UserError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 << 20


def test_an_error_while_writing_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), BinidxWriter(tmp_path / "x", "uint16") as writer:
        writer.add([1, 2], [0, 1])
        assert not (tmp_path / "x.bin").exists()
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_no_document_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="no document"), BinidxWriter(tmp_path / "x", "uint16"):
        pass
    assert os.listdir(tmp_path) == []


def test_existing_files_are_kept_unless_overwritten(tmp_path):
    write(tmp_path / "x", [[1, 2], [3]], masks=[[0, 1], [1]])
    before = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    with pytest.raises(UserError, match="--overwrite"):
        write(tmp_path / "x", [[4]])
    assert before == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} and len(before) == 3
    write(tmp_path / "x", [[4]], overwrite=True)
    assert BinidxDocuments(tmp_path / "x")[0].tolist() == [4]
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.idx"], "the old mask does not belong to the new tokens"


@pytest.mark.parametrize("stop", range(5))
def test_a_crash_between_two_renames_never_shows_a_mixed_pair(tmp_path, monkeypatch, stop):
    write(tmp_path / "x", [[1, 2], [3]], masks=[[0, 1], [1]])
    calls = iter(range(9))

    def crash(writer):
        if next(calls) == stop:
            raise SystemError

    monkeypatch.setattr(BinidxWriter, "_sync_folder", crash)
    with contextlib.suppress(SystemError):
        write(tmp_path / "x", [[7, 8, 9]], masks=[[0, 1, 1]], overwrite=True)
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    if (tmp_path / "x.idx").exists():
        docs = BinidxDocuments(tmp_path / "x")
        assert docs[0].tolist() == [7, 8, 9] and docs.mask.tolist() == [0, 1, 1]
    else:
        assert stop < 3


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"token 65536 does not fit uint16 \(0 to 65535\)"):
        write(tmp_path / "x", [[1, 65536]])
    with pytest.raises(UserError, match="token -1"):
        write(tmp_path / "x", [[1, -1]], "int32")
    with pytest.raises(UserError, match="document 1 is empty"):
        write(tmp_path / "x", [[1], []])
    with pytest.raises(UserError, match="float64: binidx is written as"):
        BinidxWriter(tmp_path / "x", "float64")
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")

    def open_full(writer, end):
        Path(writer._temporary(end)).touch()
        writer._files[end] = open("/dev/full", "wb")  # noqa: SIM115

    monkeypatch.setattr(BinidxWriter, "_open", open_full)
    with pytest.raises(UserError, match="No space left on device; free space"):
        write(tmp_path / "x", [np.arange(1000)] * 100)
    assert os.listdir(tmp_path) == []


def test_an_impossible_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        BinidxWriter(tmp_path / "file" / "x")
