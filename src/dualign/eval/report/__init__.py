"""`dualign report`: one self-contained page about runs, and every figure as PNG and CSV beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dualign.common.errors import UserError


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """The page's path. Raises UserError without matplotlib, and for what is no run."""
    from dualign.common.durable import write_text
    from dualign.eval.report.data import collect
    from dualign.eval.report.figures import draw_all
    from dualign.eval.report.page import render

    first, *others = folders
    several = first.parent / f"report-{'-'.join(folder.name for folder in folders)}"  # not over the first one's own
    path = out or (several if others else first / "report") / "index.html"
    if path.suffix != ".html":
        raise UserError(f"{path}: the report is an .html file")
    runs = collect(folders)
    figures = draw_all(runs)
    beside = path.parent / "figures"
    beside.mkdir(parents=True, exist_ok=True)
    for figure in figures:
        figure.save(beside)
    write_text(path, render(runs, figures))
    return path
