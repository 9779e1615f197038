"""How base.pth, the demo's model, was made: Python's documentation sources -> plain text as jsonl, and a byte-level BPE
vocabulary of 2,048 for it; the printed command trains the model. It is shipped (6 MB, 3 million parameters) so that the demo
and its test need no download.
"""

import json
import re
from pathlib import Path

from ..errors import Parser, UserError, run

VOCAB_SIZE = 2048
SIZES = "--n_layer 6 --n_embd 160 --head_size_a 32 --vocab_size 2048"
SCHEDULE = "--dataload chunk --ctx_len 256 --micro_bsz 8 --lr_init 3e-3 --lr_final 1e-4 --lr_schedule cos --warmup_steps 30"

ROLE = re.compile(r":[\w:+.-]+:`[~!]?([^`<]*?)(?:\s*<[^`]*>)?`")
LINK = re.compile(r"`([^`<]+?)\s*<[^`]+>`__?")
DIRECTIVE = re.compile(r"^\s*\.\. (?!note|warning|seealso|function|method|class|data|attribute|exception)[\w-]*:?.*$")
OPTION = re.compile(r"^\s*:\w+:.*$")


def plain(text: str) -> str:
    """reStructuredText without what only its compiler reads."""
    lines = [line for line in text.splitlines() if not DIRECTIVE.match(line) and not OPTION.match(line)]
    text = LINK.sub(r"\1", ROLE.sub(r"\1", "\n".join(lines))).replace("``", "`").replace(".. ", "").replace("::", ":")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def sections(text: str, size: int = 6000) -> list[str]:
    """A page in pieces of some thousand characters, cut at blank lines."""
    pieces, piece = [], ""
    for paragraph in text.split("\n\n"):
        if piece and len(piece) + len(paragraph) > size:
            pieces.append(piece)
            piece = ""
        piece += ("\n\n" if piece else "") + paragraph
    return [*pieces, piece]


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("sources", type=Path, help="folder of .rst or .rst.txt files")
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    files = sorted([*args.sources.rglob("*.rst"), *args.sources.rglob("*.rst.txt")])
    if not files:
        raise UserError(f"{args.sources}: no .rst or .rst.txt files in it")
    from tokenizers import ByteLevelBPETokenizer

    texts = [piece for file in files for piece in sections(plain(file.read_text(encoding="utf-8"))) if len(piece) > 200]
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCAB_SIZE, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    print(f"{len(files)} pages, {len(texts)} documents, {sum(map(len, texts)):,} characters")
    print(f'python train.py --load_model "" --peft none {SIZES} --data_file {args.out / "text.jsonl"} '
          f'--tokenizer {args.out / "tokenizer.json"} {SCHEDULE} --proj_dir {args.out / "base"}')  # fmt: skip
    return 0


if __name__ == "__main__":
    run(main)
