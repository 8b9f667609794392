"""Results in the terminal."""

from __future__ import annotations

import shutil
from contextvars import ContextVar

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from dualign.common.errors import clean
from dualign.common.json_text import document
from dualign.eval.result import Result, Table

AS_JSON: ContextVar[bool] = ContextVar("AS_JSON", default=False)
"""Whether results are printed for programs."""


def show(result: Result) -> None:
    if AS_JSON.get():
        print(document(result.json() | {"path": result.path}))
        return
    # wide enough for every table: a narrow terminal wraps lines, which reads better than columns of one word
    width = max(140, shutil.get_terminal_size().columns)
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)
    for table in result.tables:
        console.print(Text(clean(_title(table)), style="italic"))
        console.print(_grid(table))
        for note in table.notes:
            console.print(Text(clean(note)))
    if result.headline:
        console.print(Text(clean(result.headline)))
    if result.path:
        rows = f", every row in {result.path.with_suffix('.jsonl').name}" if result.rows else ""
        console.print(f"in {result.path}{rows}")


def _title(table: Table) -> str:
    about = [f"{key} {value}" for key, value in table.about.items() if value not in table.title]
    return ", ".join([f"{table.source}: {table.title}" if table.source else table.title, *about])


def _grid(table: Table) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(table.columns):
        grid.add_column(clean(column.name), justify="right" if i else "left")
    for row in table.texts():
        grid.add_row(*map(clean, row))
    return grid
