"""Paths as people write them."""

from __future__ import annotations

import os
import re
from pathlib import Path

HOME = re.compile(r"~[\w.-]*/")  # ~/x, ~somebody/x; a bare ~ is YAML's null


def at_home(text: str) -> str:
    """A path that begins with ~/ as one that begins with the user's folder; any other text as it is. A shell does that
    only where a word begins with it: not in run.dir=~/x, and not in a recipe."""
    return os.path.expanduser(text) if HOME.match(text) else text


def path_of(text: str | Path) -> Path:
    """The path that a text names; of the folder of a user who is not there, as it is written: nothing lies there."""
    return Path(os.path.expanduser(text))


def as_written(text: str | None) -> str | None:
    """A text of a command line that is no path: left as it is."""
    return text


def cache_dir() -> Path:
    """Where what is made or fetched once is kept."""
    return Path(os.environ.get("DUALIGN_CACHE") or "~/.cache/dualign").expanduser()
