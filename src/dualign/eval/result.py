"""What every evaluation gives: rows for a file, a headline for people, tables for the terminal and the page."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dualign.common.intervals import bracket, known
from dualign.eval.statistics import Estimate

Json = dict[str, Any]
Cell = Any  # text, a number, an Estimate (or its record), a tuple of such, or None where nothing is known
FORM = re.compile(r"[^{}]*\{:[^{}]*\}[^{}]*")


@dataclass(frozen=True)
class Column:
    """`form`: how its numbers are written, with their unit ("{:.1%}", "{:.0f} tokens"). `bound`: likewise for the ends
    of intervals, where these are written otherwise. Texts stand as they are."""

    name: str
    form: str | None = None
    bound: str | None = None

    def __post_init__(self) -> None:
        for form in (self.form, self.bound):
            if form is not None and not FORM.fullmatch(form):
                raise ValueError(f"column {self.name!r}: form {form!r}: expected one number's, such as '{{:.1%}}'")

    def text(self, cell: Cell) -> str:
        """A cell for people."""
        if isinstance(cell, str):
            return cell
        if isinstance(cell, list | tuple):
            return "/".join(map(self.text, cell))
        if isinstance(cell, Estimate | Mapping):
            estimate = cell.record() if isinstance(cell, Estimate) else cell
            return bracket(estimate, self.form or "{:.3g}", self.bound)
        if not known(cell):
            return "–"
        return (self.form or ("{:,}" if isinstance(cell, int) else "{:.3g}")).format(cell)


@dataclass(frozen=True)
class Plot:
    """A figure of a table: the column along the bottom and those drawn above it. Tables whose plots have one name share
    a figure. `about`: what it shows, for those who cannot see it; `line`: a value to compare with; `mark`: a place
    along the bottom."""

    name: str
    x: str
    y: Sequence[str]
    title: str
    about: str
    line: float | None = None
    mark: float | None = None


@dataclass(frozen=True)
class Table:
    """`source`: which of the evaluated sources it is about, None for all of them. `about`: what tells it from others
    of the same title (judge and the like). `over`: where the rows are one thing in the course of time, what each is of
    ("policy", "batch"): an overview shows the last."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    notes: Sequence[str] = ()
    source: str | None = None
    about: Mapping[str, str] = field(default_factory=dict)
    over: str | None = None
    plot: Plot | None = None
    run: str | None = None  # where its source lies, seen from the result's folder; set where the result is written

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"table {self.title!r}: a row of {len(row)} cells for {len(self.columns)} columns: {row}"
                )
        self.texts()  # a form that does not fit is found where the table is made
        named = {self.plot.x, *self.plot.y} if self.plot else set()
        if missing := named - {column.name for column in self.columns}:
            raise ValueError(f"table {self.title!r}: its plot is of columns that it does not have: {sorted(missing)}")
        for name in named:
            self.numbers(name)

    def texts(self) -> list[list[str]]:
        return [[c.text(cell) for c, cell in zip(self.columns, row, strict=True)] for row in self.rows]

    def numbers(self, name: str) -> list[dict[str, float | None]]:
        """A column's {value, low, high, ...}. Raises TypeError where it holds anything but numbers and estimates."""
        at = [column.name for column in self.columns].index(name)
        found = [asdict(row[at]) if isinstance(row[at], Estimate) else row[at] for row in self.rows]
        if any(isinstance(cell, str | list | tuple) for cell in found):
            raise TypeError(f"table {self.title!r}: column {name!r} is plotted and holds other things than numbers")
        return [e if isinstance(e, dict) else {"value": e, "low": None, "high": None} for e in found]

    def is_about(self, run: Path) -> bool:
        """Whether the page of `run`, in whose eval folder it was found, shows it: by where its source lies, never by a
        name alone."""
        if self.run is None:
            return self.source is None
        return (run / "eval" / self.run).resolve() == run.resolve()

    @staticmethod
    def of(record: Json) -> Table:
        """From a result's file. Raises TypeError, KeyError or ValueError for what is none."""
        plot = Plot(**record["plot"]) if record["plot"] else None
        return Table(**record | {"columns": [Column(**c) for c in record["columns"]], "plot": plot})


@dataclass(frozen=True)
class Result:
    """`rows`: a record for each thing that was looked at, kept line by line in NAME.jsonl. `record`: what NAME.json
    holds beside headline and tables: what made it, and numbers for programs."""

    rows: Sequence[Mapping[str, Any]]
    headline: str
    tables: Sequence[Table]
    record: Mapping[str, Any] = field(default_factory=dict)
    path: Path | None = None  # of NAME.json, once it is written

    def json(self) -> Json:
        return {**self.record, "headline": self.headline, "tables": [asdict(table) for table in self.tables]}
