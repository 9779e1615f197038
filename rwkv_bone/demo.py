"""The whole way on a small model, with nothing but what Python and this package bring.

A small RWKV-6 is trained from scratch on Python's own help topics, fine-tuned with Bone on questions and answers made of
docstrings, merged, and asked the same before and after. Each step is the command that a user would type.
"""

import argparse
import importlib
import inspect
import json
import shlex
import subprocess
import sys
from pathlib import Path

from .errors import UserError, run

MODULES = (
    "builtins os os.path shutil pathlib re json math cmath random statistics itertools functools collections string textwrap "
    "datetime time calendar csv sqlite3 zipfile tarfile gzip bz2 lzma struct codecs hashlib hmac secrets base64 binascii uuid "
    "logging argparse subprocess threading queue socket ssl select asyncio signal tempfile glob fnmatch linecache pickle copy "
    "pprint types typing inspect dis ast tokenize heapq bisect array weakref contextlib abc operator decimal fractions email "
    "html urllib.parse urllib.request http.client ftplib smtplib imaplib configparser unittest doctest pdb timeit trace gc sys "
    "locale gettext unicodedata difflib platform errno io mmap shelve sched bdb code zlib warnings traceback cProfile"
).split()

BASE = ["--n_layer", "4", "--n_embd", "128", "--head_size_a", "32", "--vocab_size", "257", "--ctx_len", "256"]
QUESTIONS = ("What does json.loads do?", "What does os.path.join do?", "What does math.sqrt do?")


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


def ask(model: Path) -> None:
    for question in QUESTIONS:
        prompt = f"User: {question}\n\nAssistant:"
        command("generate", "--model", model, "--prompt", prompt, "--max_tokens", 80, "--temperature", 0, "--stop", "\n\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="rwkv-bone demo", description=__doc__)
    parser.add_argument("folder", nargs="?", default="out/demo", type=Path)
    parser.add_argument("--minutes", type=float, default=1.0, help="time for the base model's training (default: 1)")
    args = parser.parse_args(argv)
    folder = args.folder
    folder.mkdir(parents=True, exist_ok=True)
    steps = max(2, int(args.minutes * 150))
    base, tuned, merged = folder / "base", folder / "tuned", folder / "tuned.pth"

    text = write_jsonl(folder / "help_topics.jsonl", help_topics())
    pairs = write_jsonl(folder / "questions.jsonl", questions())
    command("train", "--load_model", "", "--peft", "none", *BASE, "--data_file", text, "--data_type", "jsonl",
            "--dataload", "chunk", "--micro_bsz", 8, "--epoch_steps", steps, "--lr_init", "2e-3", "--lr_final", "2e-4",
            "--lr_schedule", "cos", "--warmup_steps", 10, "--proj_dir", base, "--overwrite")  # fmt: skip
    before = base / "rwkv-0.pth"
    command("train", "--load_model", before, "--peft", "bone", "--r", 32, "--data_file", pairs, "--data_type", "jsonl",
            "--micro_bsz", 16, "--epoch_count", 2, "--epoch_steps", steps // 2, "--lr_init", "2e-3", "--lr_final", "2e-4",
            "--lr_schedule", "cos", "--proj_dir", tuned, "--overwrite")  # fmt: skip
    command("merge", "--base_model", before, "--peft_checkpoint", tuned / "rwkv-1.pth", "--output", merged)
    print("\n--- before")
    ask(before)
    print("\n--- after")
    ask(merged)
    command("plot", base, tuned, "--out", folder / "loss.png")
    print(f"\nThe tuned model is {merged}, the loss curves are {folder / 'loss.png'}.")
    return 0


if __name__ == "__main__":
    run(main)
