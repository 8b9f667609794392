"""The state of the git checkout that a folder is in."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

PATIENCE = 10.0  # seconds


def git_state(folder: Path) -> dict[str, Any] | None:
    """{"commit", "branch", "changed": files that differ from the commit}; None in no checkout, or without git. Never a
    remote's address: it may hold a token."""
    commit, branch = _git(folder, "rev-parse", "HEAD"), _git(folder, "rev-parse", "--abbrev-ref", "HEAD")
    if not commit:
        return None
    changed = (_git(folder, "status", "--porcelain", "--untracked-files=no") or "").splitlines()
    return {"commit": commit, "branch": branch, "changed": sorted(line[3:] for line in changed)}


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.rstrip() if done.returncode == 0 else None
