"""Text <-> tokens: bytes, the RWKV World vocabulary, or a tokenizer.json.

    tokenizer = open_tokenizer("auto", vocab_size=65536)
    tokenizer.encode(text) -> ids;   tokenizer.decode(ids) -> text, for any ids;   tokenizer.end: the ids that end a document

World is greedy: at each place the longest entry of the vocabulary that fits, over the bytes of UTF-8. Its file has a line
"id literal length" for each entry, ids from 1; 0 is not in it and ends a document. The vocabulary is pyrwkv-tokenizer's; the
encoder is a kernel (rwkv_bone/ops/world.py), or pyrwkv-tokenizer's where there is no compiler; decoding is a table.
"""

import ast
import codecs
import hashlib
import os
import re
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..ops.world import Vocabulary

WORLD_SHA256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"  # with \n line ends
UNKNOWN = "\ufffd"
PLAIN_LINE = re.compile(r"^([0-9]+) '([^'\\\n]+)' ([0-9]+)$", re.MULTILINE)  # most of a vocabulary's; the others are parsed
KINDS = ("byte", "world", "tokenizer.json")
ENCODINGS = ("utf-8", "utf-16-le")  # of bytes


class Tokenizer:
    """What the tokenizers share. `encoding` is that of the bytes which `decode_bytes` gives; str() names it for people."""

    kind: str  # of KINDS
    encoding = "utf-8"
    vocab_size: int
    begin: tuple[int, ...] = ()  # what a text begins with, where it is no template's
    end: tuple[int, ...] = (0,)
    stops: frozenset[int] = frozenset()  # single tokens at which an answer ends too

    def identity(self) -> dict[str, str]:
        """What the record of an adapter or a model keeps of the tokenizer that read its text: `recorded` finds it again."""
        return {"kind": self.kind, "encoding": self.encoding}

    def vocabulary(self) -> list[bytes | None]:
        """The bytes of each token from 1 on, None for an id that means nothing; for a vocabulary of byte strings."""
        raise UserError(f"the vocabulary of {self} is no list of byte strings")

    def encode(self, text: str) -> list[int]:
        """Tokens of `text`, without an end. UserError for text that is no Unicode (lone surrogates)."""
        raise NotImplementedError

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, the quickest way there is."""
        return [self.encode(text) for text in texts]

    def encode_documents(self, stretches: list[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of all stretches in one array, uint16 where the vocabulary fits, else int32, and how many each has, int64.

        `counts` consecutive stretches are a document. Each is tokenised by itself, unless that would put something before it.
        """
        return self._flat(self.encode_batch(stretches))

    def _flat(self, ids: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        # array("I") takes numbers out of a list at twice the speed of numpy
        return np.frombuffer(array("I", list(chain.from_iterable(ids))), np.uintc).astype(self._dtype), lengths

    @property
    def _dtype(self) -> type:
        return np.uint16 if self.vocab_size <= 1 << 16 else np.int32

    def encode_after(self, text: str) -> list[int]:
        """`encode` of what stands behind other text."""
        return self.encode(text)

    def decode_bytes(self, ids) -> bytes:
        """Bytes of any sequence of ids. An id that means nothing gives U+FFFD, the end of a document nothing."""
        raise NotImplementedError

    def decode(self, ids) -> str:
        """Text of any sequence of ids; what is no text (half a character, an unknown id) becomes U+FFFD."""
        return self.decode_bytes(ids).decode(self.encoding, "replace")

    def stream(self):
        """A function for text as it is sampled: id -> the text that is complete with it, often ""; None -> the rest."""
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        return lambda token: decoder.decode(b"" if token is None else self.decode_bytes([token]), token is None)

    def _bytes(self, text: str) -> bytes:
        return unicode_bytes(text, self.encoding)


def unicode_bytes(text: str, encoding: str = "utf-8") -> bytes:
    """UserError for lone surrogates."""
    try:
        return text.encode(encoding)
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        raise UserError(f"character {error.start} is U+{code:04X}, half of a surrogate pair; remove it") from None


class ByteTokenizer(Tokenizer):
    """Bytes as tokens, for vocabularies of 256 and 257.

    257: id = byte + 1, and 0 ends a document: any text has an encoding.
    256: id = byte; no id is left over, so the character U+0000 ends a document: one 0 in utf-8, two in utf-16-le. Text that
    holds U+0000 itself is refused. (Models whose training stream was 16-bit values take utf-16-le.)
    """

    kind = "byte"

    def __init__(self, vocab_size: int = 256, encoding: str = "utf-8"):
        if vocab_size not in (256, 257):
            raise UserError(f"bytes make a vocabulary (--vocab_size) of 256 or 257, not {vocab_size}")
        if encoding not in ENCODINGS:
            raise UserError(f"encoding {encoding!r}: a byte tokenizer has utf-8 or utf-16-le")
        self.vocab_size, self.encoding = vocab_size, encoding
        self._shift = vocab_size - 256
        if vocab_size == 256:
            self.end = tuple("\0".encode(encoding))

    def __str__(self) -> str:
        return f"bytes of {self.encoding}"

    def vocabulary(self) -> list[bytes | None]:
        return [bytes([token - self._shift]) for token in range(1, self.vocab_size)]

    def encode(self, text: str) -> list[int]:
        return [byte + self._shift for byte in self._bytes(text)]

    def encode_documents(self, stretches: list[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        data = [self._bytes(text) for text in stretches]
        tokens = np.frombuffer(b"".join(data), np.uint8).astype(self._dtype) + self._dtype(self._shift)
        return tokens, np.fromiter(map(len, data), np.int64, len(data))

    def _bytes(self, text: str) -> bytes:
        if not self._shift and "\0" in text:
            raise UserError("the text holds U+0000, which ends a document where the vocabulary is 256; remove it")
        return super()._bytes(text)

    def decode_bytes(self, ids) -> bytes:
        unknown, top = UNKNOWN.encode(self.encoding), 255 + self._shift
        if self._shift:
            return b"".join(bytes([i - 1]) if 0 < i <= top else b"" if i == 0 else unknown for i in map(int, ids))
        return b"".join(bytes([i]) if 0 <= i <= top else unknown for i in map(int, ids))

    def decode(self, ids) -> str:
        text = super().decode(ids)
        return text if self._shift else text.replace("\0", "")


class WorldTokenizer(Tokenizer):
    """The RWKV World vocabulary, 65536 ids of which 65529 are in the file.

    vocab_file   another file of its format
    """

    kind = "world"

    def __init__(self, vocab_file=None, vocab_size: int = 65536):
        try:
            import pyrwkv_tokenizer
        except ImportError:
            raise UserError("the World vocabulary is not here: pip install pyrwkv-tokenizer") from None
        its_own = Path(pyrwkv_tokenizer.__file__).with_name("rwkv_vocab_v20230424.txt")
        self.vocab_file, self.vocab_size = os.fspath(vocab_file or its_own), vocab_size
        self._entries, digest = _read_vocabulary(self.vocab_file)
        self._usual = digest == WORLD_SHA256
        _check_top(max(self._entries), vocab_size, self.vocab_file)

    def __str__(self) -> str:
        return "World" if self._usual else f"World's kind, with the vocabulary {self.vocab_file}"

    def identity(self) -> dict[str, str]:
        own = {} if self._usual else {"file": self.vocab_file, "sha256": file_digest(self.vocab_file)}
        return super().identity() | own

    def vocabulary(self) -> list[bytes | None]:
        return [self._entries.get(token) for token in range(1, self.vocab_size)]

    @cached_property
    def _kernel(self) -> Vocabulary | None:
        """None where it cannot be built: pyrwkv-tokenizer does the same, with the usual vocabulary alone."""
        try:
            return Vocabulary(self._entries)
        except UserError as error:
            if self._usual:
                return None
            raise UserError(f"{self.vocab_file}: another vocabulary than World's needs a C++ compiler: {error}") from None

    @cached_property
    def _rust(self) -> Any:
        import pyrwkv_tokenizer

        return pyrwkv_tokenizer.RWKVTokenizer().tokenizer

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        data = [self._bytes(text) for text in texts]
        if self._kernel is None:
            return self._rust.encode_batch(list(texts))
        tokens, lengths = self._kernel.encode(data)
        return [piece.tolist() for piece in np.split(tokens, np.cumsum(lengths)[:-1])][: len(data)]

    def encode_documents(self, stretches: list[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if self._kernel is None:
            return super().encode_documents(stretches, counts)
        return self._kernel.encode([self._bytes(text) for text in stretches])

    def decode_bytes(self, ids) -> bytes:
        entries, unknown = self._entries, UNKNOWN.encode()
        return b"".join(entries.get(i, unknown) if i else b"" for i in map(int, ids))

    def __reduce__(self):
        return WorldTokenizer, (self.vocab_file, self.vocab_size)


class TokenizersTokenizer(Tokenizer):
    """A tokenizer.json, by the `tokenizers` package.

    source   its path, or its text
    own      what the model's files say of their text (models/base.py, OwnText): its end of text ends a document, and what the
             tokenizer puts before a text begins one. None: no special tokens are added, and token 0 ends a document, as with RWKV
    """

    kind = "tokenizer.json"

    def __init__(self, source, vocab_size: int, own: Any = None):
        from tokenizers import Tokenizer as Backend

        self.source, self.own = os.fspath(source), own
        inside = self.source.lstrip().startswith("{")
        self.path = "of the model's file" if inside else self.source
        try:
            self._backend = Backend.from_str(self.source) if inside else Backend.from_file(self.source)
        except Exception as error:  # the package raises no narrower class
            raise UserError(f"{self.path} is no tokenizer.json: {str(error).splitlines()[0]}") from None
        self._backend.no_truncation()
        self._backend.no_padding()
        _check_top(max(self._backend.get_vocab(with_added_tokens=True).values(), default=0), vocab_size, self.path)
        self.vocab_size = vocab_size
        first = self._backend.encode("a", add_special_tokens=False).tokens[:1]
        self._prefixes = first[0][:1] in ("▁", "Ġ") if first else False  # LLaMA 2 and Mistral: a text begins with a space
        if own is not None:
            self._take_ends(own)

    def identity(self) -> dict[str, str]:
        named = {"file": self.path, "sha256": file_digest(self.path)} if self.own is None and self.path == self.source else {}
        return super().identity() | named

    def _take_ends(self, own) -> None:
        end = self._backend.token_to_id(own.tokens.get("eos_token", ""))
        ends = own.ends if end is None else (end, *own.ends)
        if not ends:
            raise UserError(f"{self.path}: its folder names no end of text (eos_token in tokenizer_config.json)")
        self.end, self.stops = ends[:1], frozenset(ends)
        plain, full = (self._backend.encode("a", add_special_tokens=special).ids for special in (False, True))
        self.begin = next((tuple(full[:i]) for i in range(len(full)) if full[i : i + len(plain)] == plain), ())

    def __str__(self) -> str:
        return f"{self.kind} ({self.path})"

    def encode(self, text: str) -> list[int]:
        self._bytes(text)  # refuses what is no Unicode
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        for text in texts:
            self._bytes(text)
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_documents(self, stretches: list[str], counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        if not self._prefixes:
            return super().encode_documents(stretches, counts)
        ids: list[list[int]] = [[] for _ in stretches]
        at = 0
        for count in counts:  # whole, and cut where the stretches end: a token belongs to the stretch of its last character
            pieces = stretches[at : at + count]
            self._bytes("".join(pieces))
            encoding = self._backend.encode("".join(pieces), add_special_tokens=False)
            ends = list(accumulate(map(len, pieces)))
            for token, (_, end) in zip(encoding.ids, encoding.offsets):
                ids[at + bisect_left(ends, end)].append(token)
            at += count
        return self._flat(ids)

    def encode_after(self, text: str) -> list[int]:
        if not self._prefixes:
            return self.encode(text)
        self._bytes(text)
        encoding = self._backend.encode("\n" + text, add_special_tokens=False)
        return [token for token, (_, end) in zip(encoding.ids, encoding.offsets) if end > 1]

    def decode(self, ids) -> str:
        runs, known = [], []  # ids the tokenizer knows decode together, others one by one to U+FFFD
        first = 1 if self.own is None else 0
        for i in map(int, ids):
            if first <= i < self.vocab_size and self._backend.id_to_token(i) is not None:
                known.append(i)
            else:
                runs += [self._backend.decode(known, skip_special_tokens=False), UNKNOWN if i else ""]
                known = []
        return "".join([*runs, self._backend.decode(known, skip_special_tokens=False)])

    def decode_bytes(self, ids) -> bytes:
        return self.decode(ids).encode()

    def stream(self):
        ids, shown = [], 0

        def step(token):
            nonlocal shown
            if token is not None:
                ids.append(token)
            text = self.decode(ids)
            if token is not None and text.endswith(UNKNOWN):  # perhaps half a character
                return ""
            new, shown = text[shown:], len(text)
            return new

        return step

    def __reduce__(self):
        return TokenizersTokenizer, (self.source, self.vocab_size, self.own)


def open_tokenizer(
    spec: str = "auto", vocab_size: int = 65536, vocab_file=None, encoding: str = "utf-8", own: Any = None
) -> Tokenizer:
    """The tokenizer for a model of `vocab_size`.

    spec        "byte", "world", a path to a tokenizer.json, or "auto": the model's own; bytes for 256 and 257; World for 65536
    vocab_file  another vocabulary in the format of World's
    encoding    of bytes: "utf-8" or "utf-16-le"
    own         what the model's files say of their text (models/base.py, OwnText)
    """
    spec = os.fspath(spec or "auto")
    if own is not None and spec == "auto":
        if encoding != "utf-8":
            raise UserError(f"--encoding {encoding} is for bytes, and the model has a tokenizer of its own; leave it out")
        return TokenizersTokenizer(own.tokenizer, vocab_size, own)
    if spec == "auto":
        known = {256: "byte", 257: "byte", 65536: "world"}.get(vocab_size)
        if known is None:
            raise UserError(f"no tokenizer is known for a vocabulary of {vocab_size}; give --tokenizer PATH/tokenizer.json")
        spec = known
    if spec == "byte":
        return ByteTokenizer(vocab_size, encoding)
    if encoding != "utf-8":
        raise UserError(f"--encoding {encoding} is for bytes (a vocabulary of 256 or 257), not for a vocabulary of {vocab_size}")
    if spec == "world":
        return WorldTokenizer(vocab_file, vocab_size)
    if not os.path.isfile(spec):
        raise UserError(f"--tokenizer {spec}: no such file; give auto, byte, world or a path to a tokenizer.json")
    return TokenizersTokenizer(spec, vocab_size, own)


def recorded(identity: Any, beside: Sequence[str] = ()) -> dict[str, str]:
    """The arguments `spec`, `vocab_file`, `encoding` of `open_tokenizer` for a record; {} where it says nothing that is known.

    beside: paths in whose folders the tokenizer's file is looked for, after the place where it was. UserError if it is gone.
    """
    if not (isinstance(identity, dict) and identity.get("kind") in KINDS and identity.get("encoding") in ENCODINGS):
        return {}
    kind, name, digest = identity["kind"], identity.get("file"), identity.get("sha256")
    if not isinstance(name, str):
        return {} if kind == "tokenizer.json" else {"spec": kind, "encoding": identity["encoding"]}
    for path in (name, *(os.path.join(os.path.dirname(other), os.path.basename(name)) for other in beside)):
        if os.path.isfile(path) and file_digest(path) == digest:
            return {"spec": path} if kind == "tokenizer.json" else {"spec": kind, "vocab_file": path}
    flag = "--tokenizer" if kind == "tokenizer.json" else "--vocab_file"
    raise UserError(f"{name}, the tokenizer of the training, is not here, or is another file; give {flag} PATH")


def file_digest(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


def _check_top(top: int, vocab_size: int, path: str) -> None:
    if top >= vocab_size:
        raise UserError(f"{path} has ids up to {top}, but the model's vocabulary is {vocab_size}: take its own tokenizer")


def _read_vocabulary(path: str) -> tuple[dict[int, bytes], str]:
    """Entries by id, and the sha256 of the file with \\n line ends. Literals are read as literals, never run."""
    try:
        with open(path, "rb") as file:
            data = file.read().replace(b"\r\n", b"\n")
        text = data.decode()
    except OSError as error:
        raise UserError(f"cannot read the vocabulary {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is no World vocabulary: it is not UTF-8 text") from None
    lines = [line for line in text.split("\n") if line]
    try:
        entries = {int(number): _entry(literal, length) for number, literal, length in PLAIN_LINE.findall(text)}
        rest = [line for line in PLAIN_LINE.sub("", text).split("\n") if line]
        literals: list = []
        for lo in range(0, len(rest), 4096):  # in parts: a syntax tree takes some hundred times the text's memory
            part = (line[line.index(" ") : line.rindex(" ")] for line in rest[lo : lo + 4096])
            literals += ast.literal_eval("[" + ",".join(part) + "]")
        if len(literals) != len(rest):
            raise ValueError
        entries |= {int(line[: line.index(" ")]): _entry(x, line[line.rindex(" ") :]) for line, x in zip(rest, literals)}
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise UserError(f"{path} is no World vocabulary: {_bad_line(lines)}") from None
    if len(entries) != len(lines) or len(set(entries.values())) != len(lines) or min(entries, default=1) < 1:
        raise UserError(f"{path} is no World vocabulary: ids and entries must differ from each other, ids begin at 1")
    if not {bytes([i]) for i in range(256)} <= set(entries.values()):
        raise UserError(f"{path} is no World vocabulary: some single bytes are missing")
    return entries, hashlib.sha256(data).hexdigest()


def _entry(literal, length: str) -> bytes:
    entry = literal.encode() if isinstance(literal, str) else literal
    if not isinstance(entry, bytes) or len(entry) != int(length) or not entry:
        raise ValueError
    return entry


def _bad_line(lines: list[str]) -> str:
    for number, line in enumerate(lines, 1):
        try:
            _entry(ast.literal_eval(line[line.index(" ") : line.rindex(" ")].strip()), line[line.rindex(" ") :])
            int(line[: line.index(" ")])
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return f"line {number} is not 'id literal length'"
    return "its lines are not 'id literal length'"
