"""python -m rwkv_bone.demo: see command.py."""

from ..errors import run
from .command import main

run(main)
