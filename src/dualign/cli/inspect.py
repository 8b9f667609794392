"""verify, replay, what-if: what a run's folder tells, without a model and without a label."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(help="the run's folder")]


def register(app: typer.Typer) -> None:
    app.command()(verify)


def verify(run: RunFolder) -> None:
    """Check a run's files against their recorded hashes, and its batches against its metrics. Exit code 1: damaged."""
    from dualign.verify import verify as check

    findings = check(run)
    for finding in findings:
        print(f"{finding.kind}: {finding.text}\n  {finding.mend}")
    damaged = sum(finding.kind == "damaged" for finding in findings)
    if damaged:
        raise typer.Exit(1)
    print(f"{run}: every file is what was written" + ("; the run is not finished" if findings else ""))
