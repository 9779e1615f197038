"""Numbers as people read them, and commands as they can be typed."""

import os
import shlex
import sys


def counted(n: int, noun: str, plural: str = "s") -> str:
    """1 epoch, 2 epochs, 1,000 epochs."""
    return f"{n:,} {noun}" + ("" if n == 1 else plural)


def in_bytes(size: float) -> str:
    """1.5 GiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    raise AssertionError


def clock(seconds: float) -> str:
    """1:05, or 2:00:00 from an hour on."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def next_command(name: str, **flags: object) -> str:
    """The command line of program `name` (train, merge, generate, ...), quoted for the shell, as this process was started.

    Started by `rwkv-bone` or `python -m rwkv_bone`, it begins so; by `python train.py`, merge.py is named where train.py lies. A
    flag is left out where its value is "", None, False, "none" or "auto"; True stands for the bare flag, and a list
    for several words.
    """
    start = sys.argv[0]
    folder, program = os.path.split(start)
    if program in ("rwkv-bone", "rwkv-bone.exe"):
        words = ["rwkv-bone" if os.path.isabs(start) else start, name]
    elif program == "__main__.py" and os.path.basename(folder) == "rwkv_bone":
        words = ["python", "-m", "rwkv_bone", name]
    elif name in ("train", "merge"):
        words = ["python", os.path.join(folder if program in ("train.py", "merge.py") else "", f"{name}.py")]
    else:
        words = ["python", "-m", f"rwkv_bone.{name}"]
    for flag, value in flags.items():
        if value not in ("", None, False, "none", "auto", [], ()):
            values = [] if value is True else value if isinstance(value, list | tuple) else [value]
            words += [f"--{flag}", *map(str, values)]
    return shlex.join(words)
