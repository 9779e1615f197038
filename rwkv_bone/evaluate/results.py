"""What an evaluation leaves behind, and what is seen of it meanwhile.

A jsonl: the first line holds the settings, each other line one item, written when it is done. Started again with the same
settings, an evaluation goes on where it was; a line that was cut off by a crash is removed.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError


class Results:
    """The file at `path`, open for more items. `done`: ids of the items that it holds.

    kinds   the names of an item's values, and their types
    """

    def __init__(self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False, kinds: Mapping[str, Any] = {}):
        self.path, self.kinds = Path(path), {"id": int, **kinds}
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
                        self._check_item(row)
                        self.done.add(row["id"])
                    elif row != settings:
                        self._refuse(row, settings)
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    if isinstance(error, UserError):
                        raise
                    raise UserError(f"{self.path}, line {number + 1} is no result; give another --out, or --overwrite") from None
                size += len(line)
        return size

    def _check_item(self, row: Any) -> None:
        for name, kind in self.kinds.items():
            value = row[name]
            if not isinstance(value, kind) or (isinstance(value, int | float) and not 0 <= value < 1e300):
                raise ValueError

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
