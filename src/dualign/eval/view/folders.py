"""Which runs a folder holds, and which of their files may be read: never one that a link leads out to."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

from dualign.common.errors import UserError

DEEPEST = 5  # folders below RUNS_DIR that are looked into
MOST = 2000  # runs
RESCAN = 2.0  # seconds: how often new runs are looked for
INNER = {"batches", "checkpoints", "evaluations", "trackers", "base", "report", "node_modules", "__pycache__"}
SIGNS = ("run.json", "metrics.jsonl", "batches")  # one of these beside config.yaml makes a run


class MissingError(UserError):
    """What was asked for is not there, or may not be read."""


class Folders:
    """The runs below `root`, or `root` itself where it is one. A run is asked for by its name alone, which is looked up:
    no path comes from outside."""

    def __init__(self, root: Path) -> None:
        if not root.is_dir():
            raise UserError(f"{root}: no such folder; give the folder that holds the runs, or a run's own")
        self.root = root.resolve()
        self._lock = threading.Lock()
        self._found: dict[str, Path] = {}
        self._scanned = -RESCAN

    def runs(self) -> dict[str, Path]:
        """Folders by name, which is the path below `root` with what no text can hold escaped."""
        with self._lock:
            if time.monotonic() - self._scanned >= RESCAN:
                self._found = self._scan()
                self._scanned = time.monotonic()
            return self._found

    def run(self, name: str) -> Path:
        """Raises MissingError where there is none of this name."""
        if (found := self.runs().get(name)) is None:
            raise MissingError("no run of this name here")
        return found

    def _scan(self) -> dict[str, Path]:
        if _is_run(self.root):
            return {_text(self.root.name) or "run": self.root}
        found: dict[str, Path] = {}
        seen = {self.root}
        level = [self.root]
        for _ in range(DEEPEST):
            below = [child for folder in level for child in self._children(folder, seen)]
            runs = [child for child in below if _is_run(child)]
            found |= {_text(str(child.relative_to(self.root))): child for child in runs[: MOST - len(found)]}
            level = [child for child in below if child not in runs]
        return dict(sorted(found.items()))

    def _children(self, folder: Path, seen: set[Path]) -> list[Path]:
        """Folders in it that are no run's inner ones; what leads out of `root`, or was seen, is left out."""
        found = []
        try:
            with os.scandir(folder) as entries:
                inner = sorted(e.name for e in entries if e.name not in INNER and e.name[0] != "." and e.is_dir())
        except OSError:  # not ours to read
            return []
        for name in inner:
            path = folder / name
            real = path.resolve()
            if real not in seen and real.is_relative_to(self.root):
                seen.add(real)
                found.append(path)
        return found

    def file(self, path: Path) -> Path | None:
        """`path` where it is a file below `root`, else None: links out of it are not followed."""
        try:
            real = path.resolve(strict=True)
        except OSError:
            return None
        return real if real.is_relative_to(self.root) and real.is_file() else None


def _is_run(folder: Path) -> bool:
    try:
        return (folder / "config.yaml").is_file() and any((folder / sign).exists() for sign in SIGNS)
    except OSError:
        return False


def _text(name: str) -> str:
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def stamp(path: Path) -> tuple[int, int, int] | None:
    """Changes whenever the file does; None where there is none."""
    try:
        s = path.stat()
    except OSError:
        return None
    return s.st_ino, s.st_size, s.st_mtime_ns
