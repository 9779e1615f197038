"""The whole way on a small model, with nothing but what Python and this package bring.

A small RWKV-6 that has read Python's documentation (shipped; or, with --scratch, a new one trained on Python's help topics) is
fine-tuned with Bone on questions and answers made of docstrings, merged, and asked the same before and after. Each step is
the command that a user would type.
"""

import importlib
import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

from .. import demo as demo_model
from ..errors import Parser, UserError, run

MODULES = (
    "builtins os os.path shutil pathlib re json math cmath random statistics itertools functools collections string textwrap "
    "datetime time calendar csv sqlite3 zipfile tarfile gzip bz2 lzma struct codecs hashlib hmac secrets base64 binascii uuid "
    "logging argparse subprocess threading queue socket ssl select asyncio signal tempfile glob fnmatch linecache pickle copy "
    "pprint types typing inspect dis ast tokenize heapq bisect array weakref contextlib abc operator decimal fractions email "
    "html urllib.parse urllib.request http.client ftplib smtplib imaplib configparser unittest doctest pdb timeit trace gc sys "
    "locale gettext unicodedata difflib platform errno io mmap shelve sched bdb code zlib warnings traceback cProfile"
).split()

SCRATCH = ["--n_layer", "4", "--n_embd", "128", "--head_size_a", "32", "--vocab_size", "257"]
QUESTIONS = ("What does json.loads do?", "What does os.path.join do?", "What does shutil.copytree do?")


def help_topics() -> list[dict[str, str]]:
    """Python's help texts, as `help("TOPIC")` shows them."""
    from pydoc_data.topics import topics

    return [{"text": text.strip()} for text in topics.values()]


def questions() -> list[dict[str, str]]:
    """What every documented function of the standard library does, by the first sentence of its docstring."""
    pairs = {}
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in sorted(vars(module).items()):
            text = inspect.getdoc(value) if callable(value) and not attribute.startswith("_") else None
            sentence = " ".join((text or "").split("\n\n")[0].split())
            if 20 < len(sentence) < 200 and "->" not in sentence:
                pairs[f"What does {name}.{attribute} do?"] = sentence
    return [{"question": question, "answer": answer} for question, answer in pairs.items()]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def command(name: str, *arguments) -> None:
    """Show a command as a user would type it, and run it."""
    words = [str(a) for a in arguments]
    program = {"train": "python train.py", "merge": "python merge.py"}.get(name, f"python -m rwkv_bone.{name}")
    print(f"\n$ {program} {shlex.join(words)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "rwkv_bone", name, *words], check=False)
    if result.returncode:
        raise UserError(f"the demo stopped: this command ended with {result.returncode}")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="rwkv-bone demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default="out/demo", type=Path, help="where everything goes (default: out/demo)")
    parser.add_argument("--scratch", action="store_true", help="begin with a new model instead of the one that is shipped")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default: 300, about a minute)")
    args = parser.parse_args(argv)
    folder, steps = args.folder, args.steps
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    tuned, merged, pictured = folder / "tuned", folder / "tuned.pth", [folder / "tuned"]
    rate = ["--lr_schedule", "cos", "--warmup_steps", min(10, steps // 2), "--overwrite"]

    if args.scratch or not demo_model.BASE.exists():
        text = write_jsonl(folder / "help_topics.jsonl", help_topics())
        command("train", "--load_model", "", "--peft", "none", *SCRATCH, "--data_file", text, "--dataload", "chunk",
                "--ctx_len", 256, "--epoch_steps", steps, "--lr_init", "2e-3", "--lr_final", "2e-4", *rate,
                "--proj_dir", folder / "base")  # fmt: skip
        base, tokenizer = folder / "base" / "rwkv-0.pth", []
        pictured.insert(0, folder / "base")
    else:
        base, tokenizer = demo_model.BASE, ["--tokenizer", demo_model.TOKENIZER]
    pairs = write_jsonl(folder / "questions.jsonl", questions())
    command("train", "--load_model", base, "--peft", "bone", "--r", 32, "--data_file", pairs, *tokenizer, "--ctx_len", 128,
            "--epoch_count", 2, "--epoch_steps", steps // 2, "--micro_bsz", 16, "--lr_init", "3e-3", "--lr_final", "3e-4", *rate,
            "--proj_dir", tuned)  # fmt: skip
    command("merge", "--base_model", base, "--peft_checkpoint", tuned / "rwkv-1.pth", "--output", merged, "--overwrite")
    asking = [*tokenizer, "--instruct", "--temperature", 0, "--max_tokens", 50]
    for question in QUESTIONS:
        asking += ["--prompt", question]
    command("generate", "--model", base, *asking)
    command("generate", "--model", merged, *asking)
    command("plot", *pictured, "--out", folder / "loss.png")
    print(f"\nThe tuned model is {merged}, the loss curves are {folder / 'loss.png'}.")
    return 0


if __name__ == "__main__":
    run(main)
