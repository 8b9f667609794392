"""What programs read: with --json a command prints one JSON document, and nothing else, to standard output."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document instead")]


def document(value: Any) -> None:
    from dualign.common.json_text import document as text

    print(text(value))


def note(text: str) -> None:
    """Something for people beside a document."""
    print(text, file=sys.stderr, flush=True)


def check_json(out: Path | None) -> None:
    """Raises UserError for a place that no document goes to; to be called before anything is bought."""
    from dualign.common.errors import UserError

    if out and out.suffix != ".json":
        raise UserError(f"--out {out}: the numbers go into a .json file")


def write_document(path: Path, value: Any) -> None:
    from dualign.common.durable import write_text
    from dualign.common.json_text import document as text

    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text(value) + "\n")
