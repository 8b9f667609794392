"""How lines look, and what all figures share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dualign.eval.report.data import Json, RunData

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe & Ito's colours, told apart by people of every kind of colour vision; black and yellow left out, which vanish
# on a dark or a light page. Lines differ by dash and marker too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))
MARKERS = "osD^vP"
INK = "#010203"  # in the SVG it becomes the page's own colour of text, light or dark

Rows = list[list[Any]]
Plot = Callable[["Figure", Sequence[RunData]], Rows | None]


def style_of(i: int) -> dict[str, Any]:
    n = len(COLOURS)
    return {"color": COLOURS[i % n], "linestyle": DASHES[i % n], "marker": MARKERS[i % n], "markersize": 4}


def series(metrics: Sequence[Json], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(batches done when it was sampled, value) where a value was logged."""
    found = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
    return np.array([s for s, _ in found]), np.array([float(v) for _, v in found])


def legend(axes: Axes, runs: Sequence[RunData]) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > 1 or len(runs) > 1:
        axes.legend(handles, labels)
