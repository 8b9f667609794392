"""metrics.jsonl while it grows: what is new is read, nothing twice; a torn or damaged line costs that line alone."""

from __future__ import annotations

import json
import math
import os
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OLD_NAMES = {"missing_eos": "truncated"}  # as in run/metrics.py, which imports torch
NAN = math.nan
CHUNK = 1 << 20
LONGEST = 16 << 20  # bytes of a line


class Metrics:
    """Numbers by key, one column each (nan: none in that batch). Phases are `seconds/sample`, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self.columns: dict[str, array[float]] = {}
        self.rows = 0
        self.last: dict[str, float] = {}
        self.damaged: list[int] = []  # numbers of lines, from 1
        self._inode, self._offset, self._line = 0, 0, 0

    def update(self) -> None:
        """Reads what was added. A file that was written anew is read from its first line."""
        try:
            with open(self.path, "rb") as file:
                self._read(file)
        except OSError:
            self._begin()

    def _read(self, file: Any) -> None:
        there = os.fstat(file.fileno())
        if there.st_ino != self._inode or there.st_size < self._offset:
            self._begin()
            self._inode = there.st_ino
        file.seek(self._offset)
        rest = b""
        while len(rest) < LONGEST and (chunk := file.read(CHUNK)):
            *whole, rest = (rest + chunk).split(b"\n")
            for line in whole:
                self._offset += len(line) + 1
                self._line += 1
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            numbers = dict(_numbers(record))
            step = numbers["step"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            self.damaged.append(self._line)
            return
        if self.rows and step <= self.columns["step"][-1]:  # a batch that is told twice counts as it was told last
            self._cut(step)
        for key in numbers.keys() - self.columns.keys():
            self.columns[key] = array("d", [NAN]) * self.rows
        for key, column in self.columns.items():
            column.append(numbers.get(key, NAN))
        self.rows += 1
        self.last = numbers

    def _cut(self, step: float) -> None:
        steps = self.columns["step"]
        keep = next((i for i, s in enumerate(steps) if s >= step), len(steps))
        for column in self.columns.values():
            del column[keep:]
        self.rows = keep

    @property
    def size(self) -> int:
        """Numbers that are held."""
        return self.rows * len(self.columns)


def _numbers(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Every finite number of a record, those of an inner mapping by `outer/inner`."""
    for key, value in record.items():
        key = OLD_NAMES.get(key, key)
        if isinstance(value, dict):
            yield from ((f"{key}/{name}", number) for name, number in _numbers(value))
        elif isinstance(value, int | float) and math.isfinite(value):
            yield key, float(value)


def points(x: array[float], y: array[float], low: float, high: float, most: int) -> tuple[list[float], list[float]]:
    """What is there with x from `low` to `high`, at most about `most` points: of each stretch the least and the greatest
    value, so that no extreme is lost."""
    there = [i for i in range(min(len(x), len(y))) if low <= x[i] <= high and y[i] == y[i]]
    if len(there) > most:
        stretch = math.ceil(2 * len(there) / most)
        kept: list[int] = []
        for start in range(0, len(there), stretch):
            part = there[start : start + stretch]
            kept += sorted({min(part, key=y.__getitem__), max(part, key=y.__getitem__)})
        there = sorted({there[0], *kept, there[-1]})
    return [x[i] for i in there], [float(f"{y[i]:.6g}") for i in there]
