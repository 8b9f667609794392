"""What a run's folder should hold: the sha256 of every durable file, in one append-only, synced file.

A hash is recorded before its file appears under its name, and a removal before it happens. So a file without a hash
cannot be; and a kill between the two leaves at most a last record that the folder does not follow yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dualign.common import lines
from dualign.common.digests import sha256_of

State = Literal["good", "missing", "changed", "unknown"]


@dataclass
class Known:
    """One file: the hashes it has had (a kill may leave the one before the last), and whether it is there no more."""

    sha256: list[str] = field(default_factory=list)
    gone: bool = False


class Manifest:
    """The hashes of the files in `folder`, by path relative to it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "manifest"
        self.files: dict[str, Known] = {}
        self.last: set[str] = set()  # what the last record spoke of
        records, self._end = lines.read(self.path)
        for record in records:
            self._take(record)
        self._file: lines.Appender | None = None

    def put(self, hashes: dict[Path, str]) -> None:
        """The files as they are about to be."""
        self._add({"put": {self._name(path): sha256 for path, sha256 in hashes.items()}})

    def drop(self, paths: Iterable[Path]) -> None:
        """Files, or folders of them, that are about to go."""
        names = [self._name(path) for path in paths]
        if names:
            self._add({"drop": names})

    def check(self, path: Path) -> State:
        """How the file at `path` stands to its record."""
        known = self.files.get(self._name(path))
        if known is None:
            return "unknown"
        if not path.is_file():
            return "missing"
        return "good" if sha256_of(path) in known.sha256 else "changed"

    def _add(self, record: dict) -> None:
        if self._file is None:
            self._file = lines.Appender(self.path, self._end)
        self._file.add(record)
        self._take(record)

    def _take(self, record: dict) -> None:
        self.last = set()
        for name, sha256 in record.get("put", {}).items():
            known = self.files.setdefault(name, Known())
            known.gone = False
            known.sha256.append(sha256)
            self.last.add(name)
        for name in record.get("drop", []):
            for other, known in self.files.items():
                if other == name or other.startswith(f"{name}/"):
                    known.gone = True
                    self.last.add(other)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()
