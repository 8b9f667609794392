"""The report's figures: drawn once by matplotlib, kept as inline SVG, PNG and CSV."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError
from dualign.eval.report.data import RunData
from dualign.eval.report.declared import declared
from dualign.eval.report.plots import PLOTS
from dualign.eval.report.style import INK, Plot


@dataclass(frozen=True)
class Drawn:
    name: str
    title: str
    about: str  # what it shows, for those who cannot see it
    svg: str
    png: bytes
    rows: list[list[Any]]  # the numbers, a header first

    def save(self, folder: Path) -> None:
        from dualign.common.durable import durable, write_text

        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(self.rows)
        write_text(folder / f"{self.name}.csv", text.getvalue())
        durable(folder / f"{self.name}.png", lambda aside: aside.write_bytes(self.png))


def draw_all(runs: Sequence[RunData]) -> list[Drawn]:
    """Every figure that the runs have numbers for."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("the report needs matplotlib: pip install 'dualign[plots]'") from None
    style = {
        "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 11, "axes.spines.top": False,
        "axes.spines.right": False, "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK,
        "xtick.color": INK, "ytick.color": INK, "grid.color": "#8888", "axes.grid": True, "grid.linewidth": 0.4,
        "legend.frameon": False, "legend.fontsize": 10, "axes.facecolor": "none", "figure.facecolor": "none",
    }  # fmt: skip
    drawn = []
    for name, (title, about, plot) in (PLOTS | declared(runs, PLOTS)).items():
        with matplotlib.rc_context(style | {"svg.hashsalt": name}):
            found = _draw(name, title, about, plot, runs)
        drawn += [found] if found else []
    return drawn


def _draw(name: str, title: str, about: str, plot: Plot, runs: Sequence[RunData]) -> Drawn | None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    rows = plot(figure, runs)
    if not rows or len(rows) < 2:
        return None
    png, svg = io.BytesIO(), io.StringIO()
    figure.savefig(png, format="png", dpi=160, facecolor="white")
    figure.set_layout_engine("none")  # what is laid out stays so
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return Drawn(name, title, about, _inline(svg.getvalue(), name, about), png.getvalue(), rows)


def _inline(svg: str, name: str, about: str) -> str:
    """An SVG fit to stand in a page beside others: scaled by its viewBox, its ids its own, its ink the page's."""
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r"(xlink:href=\"#|url\(#)", rf"\g<1>{name}-", svg)
    label = escape(about)
    return re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', lambda found: (
                  f'<svg viewBox="{found[1]}" role="img" aria-label="{label}" xmlns="http://www.w3.org/2000/svg" '
                  'xmlns:xlink="http://www.w3.org/1999/xlink">'), svg, count=1)  # fmt: skip
