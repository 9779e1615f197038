"""Speed of World tokenization in MB/s, and its ratio to the Python trie of the `rwkv` package, measured in the same run.

    python benchmarks/tokenizer.py [--repeats 3] [--out benchmarks/results/tokenizer.txt]

Compared, on one thread, with equal tokens asserted first:
    rwkv trie    the reference: rwkv.rwkv_tokenizer.TRIE_TOKENIZER
    pyrwkv       pyrwkv-tokenizer, a list of numbers
    ours         WorldTokenizer, a list too;   ours, array: as data are read
    tokenizers   the World vocabulary as a model of the `tokenizers` package: byte level, then WordPiece (also a greedy longest
                 match), cut beforehand before each space that follows neither a space, \\t nor \\n: no entry of the
                 vocabulary crosses such a place, so the tokens stay the same
Texts: the standard library's source, pydoc's topics, and a page of many scripts (not for `tokenizers`: without spaces its
WordPiece is quadratic).
"""

import argparse
import datetime
import importlib.util
import os
import platform
import pydoc_data.topics
import re
import sys
import time
from pathlib import Path

from pyrwkv_tokenizer import RWKVTokenizer
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from rwkv_bone.data.tokenizer import WorldTokenizer
from rwkv_bone.doctor import cpu_name

SCRIPTS = (
    "吾輩は猫である。名前はまだ無い。 天地玄黄，宇宙洪荒。 안녕하세요 세계. Привет, мир. مرحبا بالعالم. नमस्ते दुनिया। "
    "สวัสดีชาวโลก. שלום עולם. Ångström façade über piñata. 🪿🇫🇷👍🏽 ∑∫√∞ ≠ ≤\n"
)


def corpora(size: int) -> dict[str, str]:
    folder = Path(os.__file__).parent
    source = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.py")))
    topics = "".join(pydoc_data.topics.topics.values())
    return {"python source": source[:size], "english": topics[:size], "many scripts": SCRIPTS * (size // 400)}


def as_tokenizers(world: WorldTokenizer) -> Tokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # byte level keeps these, the others follow from 256 on
    char = {byte: chr(byte) for byte in shown}
    char |= {byte: chr(256 + n) for n, byte in enumerate(sorted(set(range(256)) - set(shown)))}
    vocabulary = {"".join(char[b] for b in entry): i for i, entry in world._entries.items()}
    before = {entry[i - 1] for entry in world._entries.values() for i in range(1, len(entry)) if entry[i] == 32}
    space, glue = char[32], re.escape("".join(char[b] for b in before))
    model = models.WordPiece(vocabulary, unk_token=char[0], max_input_chars_per_word=1 << 20, continuing_subword_prefix="")
    backend = Tokenizer(model)
    pieces = Regex(f".(?:[^{space}]|(?<=[{glue}]){space})*")
    backend.pre_tokenizer = pre_tokenizers.Sequence([byte_level, pre_tokenizers.Split(pieces, "isolated")])
    return backend


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3, help="each figure is the best of so many")
    parser.add_argument("--size", type=int, default=1_000_000, help="characters of each text")
    parser.add_argument("--out", default="", help="write the table to this file too")
    args = parser.parse_args()

    folder = importlib.util.find_spec("rwkv").submodule_search_locations[0]
    world = WorldTokenizer()
    programs = {
        "rwkv trie": TRIE_TOKENIZER(os.path.join(folder, "rwkv_vocab_v20230424.txt")).encode,
        "pyrwkv": RWKVTokenizer().tokenizer.encode,
        "ours": world.encode,
        "ours, array": lambda text: world.encode_documents([text], [1])[0],
    }
    backend = as_tokenizers(world)
    lines = [f"{datetime.date.today()}, {cpu_name()}, Python {platform.python_version()}, one thread, MB/s of UTF-8"]
    lines.append(f"{'':16}" + "".join(f"{name:>20}" for name in (*programs, "tokenizers")))
    for name, text in corpora(args.size).items():
        here = dict(programs)
        if name != "many scripts":
            here["tokenizers"] = lambda text: backend.encode(text).ids
        size = len(text.encode()) / 1e6
        wanted = world.encode(text)
        seconds = dict.fromkeys(here, float("inf"))
        for _ in range(args.repeats):
            for program, encode in here.items():
                start = time.perf_counter()
                tokens = encode(text)
                seconds[program] = min(seconds[program], time.perf_counter() - start)
                assert list(tokens) == wanted, f"{program} differs on {name}"
        reference = seconds["rwkv trie"]
        shown = (f"{size / s:8.1f} ({reference / s:6.2f}x)" for s in seconds.values())
        lines.append(f"{name:16}" + "".join(f"{x:>20}" for x in shown))
    print("\n".join(lines))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
