"""The command line in this process: exit code and everything that it said."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def dualign(*argv: Any) -> Said:
    """`dualign ARGV...`. What is no clean exit is raised, as it would be a traceback."""
    from dualign.cli import main

    out, err, kept = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["dualign", *map(str, argv)]
    code: Any = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = kept
    return Said(code, out.getvalue(), err.getvalue())
