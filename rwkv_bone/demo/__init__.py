"""A small RWKV-6 that this project trained itself, for the demo and the examples: base.pth and its tokenizer.json.

It read the documentation of Python 3.11 (Python Software Foundation License; examples zero-clause BSD), as Debian's package
python3.11-doc carries it. To make it again:

    python -m rwkv_bone.demo.recipe _sources work          # reStructuredText -> work/text.jsonl, work/tokenizer.json
    python train.py --load_model "" --peft none ...               # the line that the recipe prints
"""

from pathlib import Path

FOLDER = Path(__file__).parent
BASE, TOKENIZER = FOLDER / "base.pth", FOLDER / "tokenizer.json"
