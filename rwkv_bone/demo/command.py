"""The whole way on a small model, with nothing but what this package brings: measure, train, merge, measure again.

A model of 3 million parameters that has read Python's documentation learns to write crontab lines: "Every Monday at 5:40 pm" ->
"40 17 * * 1". How often it is right is counted before and after on sentences that are not in the training data. Each step is
the command that a user would type.
"""

import json
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

from ..errors import Parser, UserError, run
from . import BASE, TOKENIZER
from .crontab import rows

HELD_OUT = 200
SAMPLES = 8  # a step


def write_jsonl(path: Path, lines: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def command(name: str, *arguments) -> None:
    """Show a command as a user would type it, and run it."""
    words = [str(a) for a in arguments]
    program = {"train": "python train.py", "merge": "python merge.py"}.get(name, f"python -m rwkv_bone.{name}")
    print(f"\n$ {program} {shlex.join(words)}", flush=True)
    result = subprocess.run([sys.executable, "-m", "rwkv_bone", name, *words], check=False)
    if result.returncode:
        raise UserError(f"the demo stopped: this command ended with {result.returncode}")


def answers(path: Path) -> list[str]:
    return [json.loads(line)["text"].strip() for line in path.read_text(encoding="utf-8").splitlines()]


def table(held_out: list[dict[str, str]], before: list[str], after: list[str]) -> str:
    """How many answers are right, and three of them."""
    wanted = [row["answer"] for row in held_out]
    share = [f"{sum(map(str.__eq__, wanted, said)) / len(wanted):.0%} right" for said in (before, after)]
    heads = [f"{len(wanted)} sentences it was not trained on", "right answer", f"before: {share[0]}", f"after: {share[1]}"]
    lines = [heads, *([row["question"], row["answer"], a, b] for row, a, b in list(zip(held_out, before, after))[:3])]
    lines = [[textwrap.shorten(cell, 45, placeholder=" ...") for cell in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="rwkv-bone demo", description=__doc__, allow_abbrev=False)
    parser.add_argument("folder", nargs="?", default="out/demo", type=Path, help="where everything goes (default: out/demo)")
    parser.add_argument("--steps", type=int, default=300, help="steps of the training (default: 300, about a minute)")
    args = parser.parse_args(argv)
    folder, steps = args.folder, args.steps
    if not 1 <= steps <= 1000:
        raise UserError(f"--steps must be from 1 to 1000, not {steps}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); name another folder") from None
    everything = rows(HELD_OUT + SAMPLES * steps)
    held_out = everything[:HELD_OUT]
    data = write_jsonl(folder / "train.jsonl", everything[HELD_OUT:])
    questions = write_jsonl(folder / "held_out.jsonl", [{"prompt": row["question"], **row} for row in held_out])
    tuned, merged = folder / "tuned", folder / "tuned.pth"
    asking = ["--tokenizer", TOKENIZER, "--instruct", "--temperature", 0, "--max_tokens", 16, "--overwrite",
              "--prompt_file", questions]  # fmt: skip

    command("generate", "--model", BASE, *asking, "--out", folder / "before.jsonl")
    command("train", "--load_model", BASE, "--tokenizer", TOKENIZER, "--data_file", data, "--peft", "bone", "--r", 32,
            "--ctx_len", 64, "--micro_bsz", SAMPLES, "--lr_init", "5e-3", "--lr_final", "1e-4", "--lr_schedule", "cos",
            "--warmup_steps", 10, "--overwrite", "--proj_dir", tuned)  # fmt: skip
    command("merge", "--base_model", BASE, "--peft_checkpoint", tuned / "rwkv-0.pth", "--output", merged, "--overwrite")
    command("generate", "--model", merged, *asking, "--out", folder / "after.jsonl")
    print(f"\n{table(held_out, answers(folder / 'before.jsonl'), answers(folder / 'after.jsonl'))}\n")
    if steps < 300:
        print(f"{steps} steps are few: after the usual 300 it is right nearly always.")
    picture = f", the loss curve {tuned / 'loss.png'}" if (tuned / "loss.png").exists() else ""  # without matplotlib: none
    print(f"The tuned model is {merged}{picture}, all answers are in {folder / 'after.jsonl'}.")
    return 0


if __name__ == "__main__":
    run(main)
