"""Where data that is not part of the repository lies: beside it, or where DUALIGN_SHARED says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("DUALIGN_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))


def shared(relative: str) -> Path:
    """The path of a shared file or folder; skips the test, with the reason, where it is absent."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is absent (set DUALIGN_SHARED to the folder that holds {relative})")
    return path
