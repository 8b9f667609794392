"""Plots of a scaling study: `python benchmarks/plots.py benchmarks/results/<date>-scaling.json`."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any


def plot_scaling(file: Path) -> list[Path]:
    """One SVG per axis beside the file: seconds per online batch and peak memory, medians with the range."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dualign"  # the same figures give the same file
    from matplotlib import pyplot

    written = []
    for axis, points in json.loads(file.read_text(encoding="utf-8"))["axes"].items():
        figure, (time, memory) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
        for system in points[0]["runs"]:
            _curve(time, points, system, lambda run: run["seconds"])
            _curve(memory, points, system, lambda run: run["peak_mb"] / 1024)
        for part, label in ((time, "seconds per online batch"), (memory, "peak memory, GiB")):
            at = [point["at"] for point in points]
            part.set(xlabel=axis, ylabel=label, xscale="log", xticks=at, xticklabels=at)
            part.minorticks_off()
            part.set_ylim(bottom=0)
            part.grid(alpha=0.3)
        time.legend(frameon=False)
        name = re.sub(r"\W+", "-", axis).strip("-")
        written.append(file.with_name(f"{file.stem}-{name}.svg"))
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written


def _curve(part: Any, points: list[Any], system: str, value: Any) -> None:
    found = [[value(run) for run in point["runs"][system]] for point in points]
    middle = [statistics.median(x) for x in found]
    errors = [
        [m - min(x) for m, x in zip(middle, found, strict=True)],
        [max(x) - m for m, x in zip(middle, found, strict=True)],
    ]
    part.errorbar([p["at"] for p in points], middle, yerr=errors, marker="o", capsize=3, label=system)


if __name__ == "__main__":
    for path in plot_scaling(Path(sys.argv[1])):
        print(path)
