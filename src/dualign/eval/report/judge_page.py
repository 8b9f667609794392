"""`dualign agreement --page`: one self-contained page, the verdict first."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from dualign.common.durable import write_text
from dualign.eval.report.tables import html, notes_of
from dualign.eval.result import Result, Table

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>$title</title>
<style>$css</style>
</head>
<body>
<header>
<h1>$title</h1>
$verdicts
</header>
<main>
$tables
</main>
</body>
</html>
""")


def write_page(result: Result, files: Sequence[str], path: Path) -> None:
    """Of the result of `dualign agreement`: what its headline says, and its tables."""
    lines = result.headline.splitlines() or ["no judge and no head was asked: there is nothing to judge"]
    page = PAGE.substitute(
        title=escape(f"dualign: is this judge any good? ({', '.join(Path(file).name for file in files)})"),
        css="".join(
            (resources.files("dualign.eval.report") / name).read_text("utf-8") for name in ("parts.css", "page.css")
        ),
        verdicts="".join(f'<p class="verdict">{escape(line)}</p>' for line in lines),
        tables="".join(map(_section, result.tables)),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, page)


def _section(table: Table) -> str:
    header = [column.name for column in table.columns]
    return f"<section><h2>{escape(table.title)}</h2>{html(header, table.texts())}{notes_of(table.notes)}</section>"
