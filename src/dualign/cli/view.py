"""view: runs on a local page, live."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    app.command()(view)


def view(
    runs: Annotated[Path, typer.Argument(metavar="[RUNS_DIR]", help="a folder of runs, or one run's own")] = Path(
        "runs"
    ),
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="default: the first free one from 8760")] = None,
    host: Annotated[
        str, typer.Option(help="where it listens; elsewhere than on this machine alone it asks for a token")
    ] = "127.0.0.1",
    browse: Annotated[bool, typer.Option("--open", help="also open a browser")] = False,
) -> None:
    """Watch runs in a browser while they happen: curves, settings, every completion. It only reads their folders."""
    from dualign.eval.view import serve

    serve(runs, host, port, browse=browse)
