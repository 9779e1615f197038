"""python -m rwkv_bone.merging: see command.py."""

from ..errors import run
from .command import main

run(main)
