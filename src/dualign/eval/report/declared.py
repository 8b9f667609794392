"""The figures that tables of evaluations declare, of all runs together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dualign.eval.places import slug
from dualign.eval.report.data import RunData
from dualign.eval.report.style import Plot, Rows, style_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def declared(runs: Sequence[RunData], taken: Collection[str]) -> dict[str, tuple[str, str, Plot]]:
    """Title, description and plot by name, which is none of those that are `taken`."""
    found: dict[str, tuple[str, str, Plot]] = {}
    for run in runs:
        for plot in (table.plot for table in run.tables if table.plot):
            name = slug(plot.name)
            found.setdefault(f"eval-{name}" if name in taken else name, (plot.title, plot.about, _of(plot.name)))
    return found


def _of(name: str) -> Plot:
    def draw(figure: Figure, runs: Sequence[RunData]) -> Rows:
        tables = [(run.name, t) for run in runs for t in run.tables if t.plot and t.plot.name == name]
        first = tables[0][1].plot
        assert first is not None
        axes = figure.subplots()
        told = list(dict.fromkeys(key for _, table in tables for key in table.about))
        rows: Rows = [["run", "table", *told, "kind", first.x, "value", "low", "high"]]
        drawn = 0
        for run, table in tables:
            assert table.plot is not None
            about = [table.about.get(key, "") for key in told]
            at = [e["value"] for e in table.numbers(table.plot.x)]
            for y in table.plot.y:
                values = [[e[key] for key in ("value", "low", "high")] for e in table.numbers(y)]
                kind = y.partition(" [")[0]
                label = ", ".join([*([run] if len(runs) > 1 else []), *map(_short, filter(None, about)), kind])
                _line(axes, np.array(at, float), np.array(values, float).reshape(-1, 3), label, drawn)
                rows += [[run, table.title, *about, kind, x, *v] for x, v in zip(at, values, strict=True)]
                drawn += 1
            if table.plot.mark is not None:
                axes.axvline(table.plot.mark, color="#888888", linestyle=":")
        if first.line is not None:
            axes.axhline(first.line, color="#888888", linewidth=1)
        axes.set(xlabel=_plain(first.x), ylabel=_plain(first.title if len(first.y) > 1 else first.y[0]))
        if all("%" in (column.form or "") for _, t in tables for column in t.columns if column.name in first.y):
            axes.set_ylim(-0.03, 1.03)
        if drawn > 1:
            axes.legend(fontsize=8 if drawn > 2 else 10)
        return rows

    return draw


def _line(axes: Axes, x: np.ndarray, e: np.ndarray, label: str, drawn: int) -> None:
    """Values with their intervals, side by side where there are several."""
    half = np.abs(e[:, 1:] - e[:, :1]).T
    look = style_of(drawn) | {"label": _plain(label)}
    if np.isfinite(half).any():
        axes.errorbar(x * (1 + 0.012 * (drawn % 6)), e[:, 0], half, capsize=3, **look)
    else:
        axes.plot(x, e[:, 0], markevery=max(1, len(x) // 12), **look)


def _short(name: str, longest: int = 24) -> str:
    """A name for the legend: of a long path its end (the table and the CSV have the whole)."""
    return name if len(name) <= longest else f"…{name[-longest:]}"


def _plain(text: str) -> str:
    """Nothing in it is a formula."""
    return text.replace("$", r"\$")
