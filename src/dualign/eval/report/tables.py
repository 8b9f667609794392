"""The tables of evaluations on the page, of all runs together; whose they are is not known here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dualign.eval.result import Table

if TYPE_CHECKING:
    from dualign.eval.report.data import RunData

Texts = Sequence[Sequence[str]]


def html(header: Sequence[str], rows: Texts) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def evaluations(runs: Sequence[RunData]) -> str:
    """Tables of one title and the same columns stand as one, a first column saying whose each row is."""
    groups: dict[object, list[tuple[str, Table]]] = {}
    for run in runs:
        for table in run.tables:
            alike = (table.title, *(column.name for column in table.columns), *table.about)
            groups.setdefault(alike, []).append((run.name, table))
    return "".join(map(_together, groups.values()))


def _together(members: Sequence[tuple[str, Table]]) -> str:
    """The last row of what has one for each batch or policy; all rows are there to be unfolded."""
    first = members[0][1]
    told = [key for key in first.about if any(table.about[key] not in table.title for _, table in members)]
    header = ["run", *told, *(column.name for column in first.columns)]

    def rows(last: bool) -> Texts:
        return [
            [run, *(table.about[key] for key in told), *texts]
            for run, table in members
            for texts in (table.texts()[-1:] if last else table.texts())
        ]

    title = f"{first.title}, last {first.over}" if first.over else first.title
    parts = [f"<h3>{escape(title)}</h3>", html(header, rows(last=bool(first.over)))]
    if first.over and any(len(table.rows) > 1 for _, table in members):
        parts.append(
            f"<details><summary>every {escape(first.over)}</summary>{html(header, rows(last=False))}</details>"
        )
    notes = [f"{run}: {note}" if len(members) > 1 else note for run, table in members for note in table.notes]
    return "".join([*parts, notes_of(notes)])


def notes_of(notes: Sequence[str]) -> str:
    return f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in notes)}</ul>' if notes else ""
