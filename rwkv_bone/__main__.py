"""`rwkv-bone COMMAND ...` and `python -m rwkv_bone COMMAND ...`: every program of the package under one name."""

import difflib
import importlib
import sys

from . import __version__
from .errors import UserError, checked, hint, run

COMMANDS = {
    "download": ("rwkv_bone.files.download", "get a base model"),
    "train": ("rwkv_bone.training.run", "fine-tune, or train from scratch"),
    "merge": ("rwkv_bone.merging.command", "base + adapter -> a model file: .pth, safetensors, gguf"),
    "generate": ("rwkv_bone.generate.command", "sample, or chat"),
    "evaluate": ("rwkv_bone.evaluate.command", "GSM8K, MATH, loss"),
    "compare": ("rwkv_bone.compare.command", "methods against each other, rates tuned, seeds, table and picture"),
    "data": ("rwkv_bone.data.jsonl_to_binidx", "rows -> binidx, for large data"),
    "plot": ("rwkv_bone.plot", "loss curves as a picture"),
    "doctor": ("rwkv_bone.doctor", "what this machine can do"),
    "demo": ("rwkv_bone.demo.command", "train, merge and sample a small model"),
}


def main() -> int:
    name, *argv = checked(sys.argv[1:]) or ["--help"]
    if name == "--version":
        print(f"rwkv-bone {__version__}")
        return 0
    if name in ("-h", "--help"):
        print("usage: rwkv-bone COMMAND ...\n")
        for command, (_, text) in COMMANDS.items():
            print(f"  {command:10} {text}")
        print("\nrun rwkv-bone COMMAND --help for options")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, 1)
        raise UserError(f"no command {name!r}; there are {', '.join(COMMANDS)}{hint(near)}")
    return importlib.import_module(COMMANDS[name][0]).main(argv) or 0


def console() -> None:
    run(main)


if __name__ == "__main__":
    console()
