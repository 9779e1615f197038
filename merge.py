"""Merge adapters into a base model: `python merge.py --base_model B.pth --peft_checkpoint A.pth --output M.pth`. See `--help`."""

from rwkv_bone.errors import run
from rwkv_bone.merging import main

if __name__ == "__main__":
    run(main)
