"""Tokenizers: equal to the reference on every golden text, safe on any ids."""

import importlib.util
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rwkv_bone.data.tokenizer import ENCODINGS, KINDS, ByteTokenizer, TokenizersTokenizer, WorldTokenizer, open_tokenizer
from rwkv_bone.errors import UserError
from rwkv_bone.ops import world as world_kernel

SHARED = Path(__file__).parents[1] / "../shared/data"
GOLDEN = SHARED / "world_tokenizer_golden.json"
golden = pytest.mark.skipif(not GOLDEN.exists(), reason="needs ../shared/data/world_tokenizer_golden.json")
texts = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(scope="module")
def world():
    return WorldTokenizer()


@pytest.fixture(scope="module")
def worlds(world, tmp_path_factory):
    """World's tokenizer, that of another file, here of the same entries, and the one where there is no compiler."""
    path = tmp_path_factory.mktemp("v") / "v.txt"
    path.write_bytes(Path(world.vocab_file).read_bytes() + b"\n")
    without_compiler = WorldTokenizer()
    without_compiler._kernel = None
    return [world, WorldTokenizer(path), without_compiler]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """A small tokenizer.json: byte-level BPE with an end of text at id 0."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    backend.train_from_iterator(["the cat and the dog and the cow"] * 9, trainer)
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    backend.save(str(path))
    return path


@golden
def test_world_tokens_of_golden_texts(worlds):
    entries = json.loads(GOLDEN.read_text())
    texts, wanted = ([entry[name] for entry in entries["strings"]] for name in ("text", "tokens"))
    for world in worlds:
        assert world.encode_batch(texts) == wanted == [world.encode(text) for text in texts]
        tokens, lengths = world.encode_documents(texts, [1] * len(texts))
        assert tokens.tolist() == [*itertools.chain(*wanted)] and tokens.dtype == np.uint16
        assert lengths.tolist() == list(map(len, wanted))
        assert [world.decode(tokens) for tokens in wanted] == texts
        for entry in entries["byte_strings"]:
            assert world.decode_bytes(entry["tokens"]) == bytes.fromhex(entry["bytes_hex"])
    assert len(entries["strings"]) == 86 and len(entries["byte_strings"]) == 8


@pytest.fixture(scope="module")
def reference():
    """The trie of the `rwkv` package: the program that models are used with."""
    pytest.importorskip("rwkv")
    from rwkv.rwkv_tokenizer import TRIE_TOKENIZER

    folder = importlib.util.find_spec("rwkv").submodule_search_locations[0]
    return TRIE_TOKENIZER(str(Path(folder) / "rwkv_vocab_v20230424.txt"))


pieces = st.lists(st.sampled_from([" ", "  ", "\n", "\n\n", "\t", "the", " the", "User:", "é", "你", "🪿", "=", "0", "a" * 9]))


@given(texts | pieces.map("".join))
def test_world_tokens_of_any_text_equal_the_reference(worlds, reference, text):
    wanted = reference.encode(text)
    for tokenizer in worlds:
        assert tokenizer.encode(text) == wanted
        assert tokenizer.decode(wanted) == text


@given(st.binary())
def test_world_decodes_the_tokens_of_any_bytes(world, reference, data):
    assert world.decode_bytes(reference.encodeBytes(data)) == data


@given(texts, st.sampled_from([(256, "utf-8"), (256, "utf-16-le"), (257, "utf-8"), (257, "utf-16-le")]))
def test_bytes_survive_the_byte_tokenizer(text, kind):
    tokenizer = ByteTokenizer(*kind)
    text = text if kind[0] == 257 else text.replace("\0", "")
    ids = tokenizer.encode(text)
    assert bytes(i - (kind[0] == 257) for i in ids) == text.encode(kind[1])
    assert tokenizer.decode(ids) == text == tokenizer.decode([*ids, *tokenizer.end])
    assert all(0 <= i < tokenizer.vocab_size for i in (*ids, *tokenizer.end))


def test_an_end_of_document_cannot_occur_in_text():
    assert ByteTokenizer(256).end == (0,) and ByteTokenizer(256, "utf-16-le").end == (0, 0) and ByteTokenizer(257).end == (0,)
    for encoding in ("utf-8", "utf-16-le"):
        with pytest.raises(UserError, match=r"U\+0000"):
            ByteTokenizer(256, encoding).encode("a\0b")
    assert ByteTokenizer(257).encode("a\0") == [98, 1]


def every_tokenizer(world, bpe):
    byte = [ByteTokenizer(v, e) for v in (256, 257) for e in ("utf-8", "utf-16-le")]
    return [*byte, world, TokenizersTokenizer(bpe, 300)]


@given(st.lists(st.integers(-(2**40), 2**40) | st.integers(0, 300) | st.integers(60000, 66000)))
def test_any_ids_decode(world, bpe, ids):
    for tokenizer in every_tokenizer(world, bpe):
        text = tokenizer.decode(ids)
        assert text.encode("utf-8") is not None
        assert isinstance(tokenizer.decode_bytes(ids), bytes)
        stream = tokenizer.stream()
        assert isinstance("".join(map(stream, ids)) + stream(None), str)


@given(texts)
def test_streamed_text_equals_the_whole(world, bpe, text):
    text = text.replace("\0", "")
    for tokenizer in every_tokenizer(world, bpe):
        stream = tokenizer.stream()
        assert "".join(map(stream, tokenizer.encode(text))) + stream(None) == text


def test_half_a_character_is_held_back_until_it_is_whole():
    stream = ByteTokenizer(256).stream()
    assert [stream(byte) for byte in "é!".encode()] == ["", "é", "!"]
    assert stream(0xE4) == "" and stream(None) == "\ufffd"


def test_unknown_ids_become_the_replacement_character(world, bpe):
    for tokenizer in every_tokenizer(world, bpe):
        assert tokenizer.decode([*tokenizer.encode("ab"), 70000, *tokenizer.encode("cd"), *tokenizer.end]) == "ab\ufffdcd"


def test_lone_surrogates_are_refused_in_one_line(world, bpe):
    for tokenizer in every_tokenizer(world, bpe):
        for encode, text in ((tokenizer.encode, "a\ud800b"), (tokenizer.encode_batch, ["ok", "a\ud800b"])):
            with pytest.raises(UserError, match=r"character 1 is U\+D800, half of a surrogate pair"):
                encode(text)


@given(st.lists(texts, max_size=5))
def test_a_batch_has_the_tokens_of_its_texts(world, bpe, batch):
    batch = [text.replace("\0", "") for text in batch]
    for tokenizer in every_tokenizer(world, bpe):
        assert tokenizer.encode_batch(batch) == [tokenizer.encode(text) for text in batch]


def test_tokenizers_survive_pickling(world, bpe):
    for tokenizer in every_tokenizer(world, bpe):
        assert pickle.loads(pickle.dumps(tokenizer)).encode("the cat") == tokenizer.encode("the cat")


def test_each_tokenizer_says_what_it_is(world, bpe):
    assert [str(ByteTokenizer(256, encoding)) for encoding in ENCODINGS] == ["bytes of utf-8", "bytes of utf-16-le"]
    assert ByteTokenizer(256, "utf-16-le").identity() == {"kind": "byte", "encoding": "utf-16-le"}
    assert str(world) == "World" and world.identity() == {"kind": "world", "encoding": "utf-8"}
    assert str(open_tokenizer(bpe, 300)) == f"tokenizer.json ({bpe})"
    assert {tokenizer.kind for tokenizer in every_tokenizer(world, bpe)} == set(KINDS)


def test_tokenizer_json_encodes_without_special_tokens(bpe):
    from tokenizers import Tokenizer

    tokenizer = open_tokenizer(str(bpe), 300)
    assert tokenizer.encode("the cat ") == Tokenizer.from_file(str(bpe)).encode("the cat ").ids
    assert tokenizer.end == (0,) and tokenizer.vocab_size == 300


def test_auto_chooses_by_vocabulary(bpe):
    assert isinstance(open_tokenizer(vocab_size=65536), WorldTokenizer)
    assert open_tokenizer("auto", 256, encoding="utf-16-le").encode("A") == [65, 0]
    assert open_tokenizer("auto", 257).encode("A") == [66]
    with pytest.raises(UserError, match=r"vocabulary of 50277; give --tokenizer"):
        open_tokenizer("auto", 50277)
    with pytest.raises(UserError, match="no such file"):
        open_tokenizer("nothing.json", 50277)
    with pytest.raises(UserError, match="256 or 257, not 65536"):
        open_tokenizer("byte", 65536)
    with pytest.raises(UserError, match="utf-8 or utf-16-le"):
        open_tokenizer("byte", 256, encoding="latin-1")
    for spec, size in (("auto", 65536), ("world", 65536), (bpe, 300)):  # not passed over in silence
        with pytest.raises(UserError, match=f"--encoding utf-16-le is for bytes .*, not for a vocabulary of {size}"):
            open_tokenizer(spec, size, encoding="utf-16-le")
    with pytest.raises(UserError, match="ids up to 65529, but the model's vocabulary is 60000"):
        open_tokenizer("world", 60000)
    with pytest.raises(UserError, match="but the model's vocabulary is 200"):
        open_tokenizer(bpe, 200)


def small_vocabulary() -> list[str]:
    return [f"{i + 1} {bytes([i])!r} 1" for i in range(256)] + ["257 'ab' 2", "258 b'abc' 3"]


def test_another_vocabulary_file_is_tokenized_by_its_own_entries(tmp_path, monkeypatch):
    path = tmp_path / "v.txt"
    path.write_text("\r\n".join(small_vocabulary()), newline="")
    tokenizer = WorldTokenizer(path, 259)
    assert tokenizer.encode("abcabxa") == [258, 257, 121, 98] and str(path) in str(tokenizer)
    path.write_text("\n".join([*small_vocabulary(), "70000 'x y' 3"]))
    assert WorldTokenizer(path, 1 << 17).encode("abcx y") == [258, 70000]  # wider than uint16
    monkeypatch.setenv("CXX", "no-compiler")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    world_kernel.library.cache_clear()
    with pytest.raises(UserError, match="needs a C\\+\\+ compiler"):
        WorldTokenizer(path, 1 << 17).encode("a")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: [*v, "259 'xy' 3"], "line 259 is not 'id literal length'"),
        (lambda v: [*v, "259 xy 2"], "line 259 is not"),
        (lambda v: [*v, "259 'xy', 'z' 2"], "line 259 is not"),
        (lambda v: [*v, "259 (((( 2"], "line 259 is not"),
        (lambda v: [*v, "x 'xy' 2"], "line 259 is not"),
        (lambda v: [*v, "259"], "line 259 is not"),
        (lambda v: [*v, "259 __import__('os').getcwd() 2"], "line 259 is not"),
        (lambda v: [*v, "258 'xy' 2"], "must differ"),
        (lambda v: [*v, "259 'ab' 2"], "must differ"),
        (lambda v: [*v, "0 'xy' 2"], "ids begin at 1"),
        (lambda v: v[1:], "single bytes are missing"),
        (lambda v: [], "single bytes are missing"),
    ],
)
def test_a_bad_vocabulary_file_is_named_by_line(tmp_path, change, message):
    path = tmp_path / "v.txt"
    path.write_text("\n".join(change(small_vocabulary())))
    with pytest.raises(UserError, match=message):
        WorldTokenizer(path)


def test_files_that_are_no_vocabulary_are_refused(tmp_path, bpe):
    with pytest.raises(UserError, match="cannot read the vocabulary"):
        WorldTokenizer(tmp_path / "none.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        WorldTokenizer(tmp_path / "b.txt")
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UserError, match=r"t\.json is no tokenizer\.json"):
        open_tokenizer(str(tmp_path / "t.json"), 300)
