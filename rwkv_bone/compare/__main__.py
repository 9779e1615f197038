"""python -m rwkv_bone.compare: see command.py."""

from ..errors import run
from .command import main

run(main)
