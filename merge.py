"""Merge adapters into a base model: `python merge.py --base_model B.pth --peft_checkpoint A.pth --output M.pth`. See `--help`."""

import sys

try:
    from rwkv_bone.errors import run
    from rwkv_bone.merging.command import main
except ModuleNotFoundError as error:
    print(f"error: no package {error.name} in {sys.executable}; activate the environment, or see README", file=sys.stderr)
    sys.exit(2)

if __name__ == "__main__":
    run(main)
