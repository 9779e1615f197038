"""python -m rwkv_bone.evaluate: see command.py."""

from ..errors import run
from .command import main

run(main)
