"""Nothing half-written is ever read: files are written aside, synced and renamed."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError


def durable(path: Path, write: Callable[[Path], Any], commit: Callable[[Path], None] = lambda aside: None) -> None:
    """Makes `path` (file or folder) appear complete or not at all, even through a power cut. `commit` is called with
    what is written and synced, before it gets its name."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        remove(aside)
        write(aside)
        for item in [aside, *(aside.rglob("*") if aside.is_dir() else ())]:
            _sync(item)
        commit(aside)
        os.replace(aside, path)
        _sync(path.parent)
    except Exception as error:
        with contextlib.suppress(OSError):
            remove(aside)
        # "os error": as Rust libraries report theirs
        if isinstance(error, UserError) or not (isinstance(error, OSError) or "os error" in str(error).lower()):
            raise
        raise UserError(
            f"{path}: cannot be written: {getattr(error, 'strerror', None) or error}. What was written before is kept; "
            "make room (or fix the folder's permissions) and resume"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    durable(path, lambda aside: aside.write_text(text, encoding="utf-8"))
