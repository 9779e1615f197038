"""Sampling (sampling.py), chat (chat.py), the command line (command.py).

May be imported by training/, evaluate/, compare/, demo/ and api.py.

This folder has the name of a function of the Python API: `rwkv_bone.generate(...)` calls that, whichever was imported first.
"""

import sys
import types
from typing import Any

from .chat import Conversation
from .sampling import DEFAULT, GREEDY, Completion, Sampling, completions, generate, read, sample, step

__all__ = ["DEFAULT", "GREEDY", "Completion", "Conversation", "Sampling", "completions", "generate", "read", "sample", "step"]


class _Callable(types.ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> list[str]:
        from ..api import generate

        return generate(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
