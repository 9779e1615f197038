"""What an evaluation leaves behind, and what is seen of it meanwhile.

A jsonl: the first line holds the settings, each other line one item, written when it is done. Started again with the same
settings, an evaluation goes on where it was; a line that was cut off by a crash is removed.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..terminal import clock


class Results:
    """The file at `path`, open for more items. `done`: ids of the items that it holds."""

    def __init__(self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False):
        self.path = Path(path)
        self.done: set[int] = set()
        settings = json.loads(json.dumps(settings))  # as it is read back: tuples are lists
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            size = self._check(settings) if self.path.exists() and not overwrite else 0
            self.file = open(self.path, "r+b" if size else "wb")  # noqa: SIM115 (closed in __exit__)
            self.file.truncate(size)
            self.file.seek(size)
            if not size:
                self._write(settings)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; give another --out") from None

    def _check(self, settings: Mapping[str, Any]) -> int:
        """Bytes of whole lines in the file, after reading which items it holds; UserError if it belongs to something else."""
        size = 0
        with open(self.path, "rb") as file:
            for number, line in enumerate(file):
                if not line.endswith(b"\n"):
                    break
                try:
                    row = json.loads(line)
                    if number:
                        self.done.add(row["id"])
                    elif row != settings:
                        self._refuse(row, settings)
                except (ValueError, KeyError, TypeError) as error:
                    if isinstance(error, UserError):
                        raise
                    raise UserError(f"{self.path}, line {number + 1} is no result; give another --out, or --overwrite") from None
                size += len(line)
        return size

    def _refuse(self, there: Any, wanted: Mapping[str, Any]) -> None:
        there = there if isinstance(there, dict) else {}
        name = next((name for name in wanted if there.get(name) != wanted[name]), "more settings")
        values = f"{_short(there.get(name))}, now {_short(wanted.get(name))}"
        raise UserError(f"{self.path} holds results of another {name} ({values}); give another --out, or --overwrite")

    def _write(self, row: Mapping[str, Any]) -> None:
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
        self.file.flush()

    def add(self, item: Mapping[str, Any]) -> None:
        """Write one item, which has an "id"."""
        try:
            self._write(item)
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}; what is written so far counts") from None
        self.done.add(item["id"])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All items, from the file."""
        with open(self.path, "rb") as file:
            next(file)
            yield from map(json.loads, file)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()


def _short(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


LINE_SECONDS = 10.0  # at least so long between two plain lines


class Progress:
    """How far something is and how long it will take: a bar on a terminal, plain lines elsewhere.

    total, done: in any unit, what is done already included.
    """

    def __init__(self, total: float, done: float = 0, stream=None):
        self.total, self.start, self.stream = max(total, 1), done, stream or sys.stderr
        self.began, self.shown_at, self.length = time.monotonic(), -LINE_SECONDS, 0

    def update(self, done: float, values: str = "") -> None:
        """done: how much by now, of `total`; values: what else to show."""
        now, terminal = time.monotonic(), self.stream.isatty()
        if now - self.shown_at < (0.1 if terminal else LINE_SECONDS) and done < self.total:
            return
        self.shown_at = now
        share = min(done / self.total, 1)
        left = (now - self.began) * (self.total - done) / (done - self.start) if done > self.start else None
        text = f"{share:4.0%}{', ' + values if values else ''}, " + ("..." if left is None else f"{clock(left)} to go")
        if terminal:
            bar = "#" * round(20 * share)
            text = f"[{bar:<20}] {text}"
            print(f"\r{text:<{self.length}}", end="", file=self.stream, flush=True)
            self.length = len(text)
        else:
            print(text.strip(), file=self.stream, flush=True)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.length:
            print(file=self.stream, flush=True)
