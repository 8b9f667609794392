"""What programs read: with --json a command prints one JSON document, and nothing else, to standard output."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON document instead")]


def document(value: Any) -> None:
    from dualign.common.json_text import document as text

    print(text(value))


def note(text: str) -> None:
    """Something for people beside a document."""
    print(text, file=sys.stderr, flush=True)
