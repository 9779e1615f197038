"""Sampling (sampling.py), chat (chat.py), the command line (command.py). May be imported by evaluate/, compare/ and demo/."""

from .chat import Conversation
from .sampling import DEFAULT, GREEDY, Completion, Sampling, completions, generate, read, sample, step

__all__ = ["DEFAULT", "GREEDY", "Completion", "Conversation", "Sampling", "completions", "generate", "read", "sample", "step"]
