"""Numbers as people read them, commands as they can be typed, and the one progress display."""

import os
import shlex
import sys
import textwrap
from typing import TextIO

from tqdm import tqdm


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


WIDTH, LABEL = 100, 11  # columns of a line, and of the word before it ("data       ...")


def fitted(line: str) -> str:
    """A line of a summary in as many as it needs; a command, which begins with its program, stays whole, to be pasted."""
    if len(line) <= WIDTH or line[LABEL:].startswith(("rwkv-bone ", "python ")):
        return line
    return textwrap.fill(line, WIDTH, subsequent_indent=" " * LABEL, break_long_words=False, break_on_hyphens=False)


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


LINE_SECONDS = 10.0  # between two plain lines, and before the first


class Progress:
    """How far something is, how fast, and how long it will take: tqdm's bar on a terminal, plain lines elsewhere.

    total, done  all there is, and how much of it was done before
    unit         what these are, in the plural ("tokens"), or "B" for bytes: the rate is shown in it; "": no rate is shown
    label        what stands before the percentage
    stream       default: stderr
    leave        False: the bar is wiped out at the end, and no plain line says 100%

    Plain lines are at least ten seconds apart and hold no control characters; what takes less than ten seconds prints none.
    """

    def __init__(
        self, total: float, done: float = 0, unit: str = "", label: str = "", stream: TextIO | None = None, leave: bool = True
    ):
        stream = stream or sys.stderr
        terminal = stream.isatty()
        every = 0.1 if terminal else LINE_SECONDS
        shape = "{desc}{percentage:3.0f}%" + "|{bar}|" * terminal + "{postfix}" + ", {rate_noinv_fmt}" * bool(unit)
        self.bar = tqdm(
            total=max(total, 1), initial=done, unit=unit if unit == "B" else f" {unit}", unit_scale=True, leave=leave,
            bar_format=shape + ", {remaining} to go", dynamic_ncols=True, file=stream if terminal else _Lines(stream),
            mininterval=every, delay=every, miniters=0, smoothing=0,
        )  # fmt: skip
        self.bar.set_description_str(label and label + " ", refresh=False)

    @property
    def done(self) -> float:
        return self.bar.n

    def update(self, done: float, values: str = "") -> None:
        """done: how much of `total` is done by now; values: what else to show, such as "loss 2.1031"."""
        self.bar.set_postfix_str(values, refresh=False)
        self.bar.update(done - self.bar.n)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()


class _Lines:
    """A file for tqdm that turns what it would draw over the last line into a line of its own."""

    def __init__(self, stream: TextIO):
        self.stream, self.last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text and text != self.last:
            print(text, file=self.stream, flush=True)
            self.last = text

    def flush(self) -> None:
        self.stream.flush()
