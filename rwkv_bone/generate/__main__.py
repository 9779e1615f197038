"""python -m rwkv_bone.generate: see command.py."""

from ..errors import run
from .command import main

run(main)
