"""The training reward and the witness side by side, and where they part."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dualign.eval.report.data import RunData
from dualign.eval.report.style import Rows, style_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def witness(figure: Figure, runs: Sequence[RunData]) -> Rows | None:
    """Two panels over one axis of batches: means over prompts with 95 % intervals, of batches and of what is held out;
    a dotted line where a witness first spoke."""
    seen = [(run, each) for run in runs for each in run.witnesses]
    if not seen:
        return None
    figure.set_figheight(5.2)
    above, below = figure.subplots(2, sharex=True)
    rows: Rows = [["run", "of", "kind", "by", "batches", "mean", "half_width_95", "spoke"]]
    for i, training in enumerate([run for run in runs if run.witnesses]):
        points = [(m["step"], m["reward"]) for m in training.metrics if m.get("reward") is not None]
        if points:
            above.plot(*zip(*points, strict=True), label=training.name, **style_of(i) | {"markersize": 2.5})
        rows += [[training.name, "reward", "batch", "", step, value, "", ""] for step, value in points]
    for i, (run, each) in enumerate(seen):
        for kind, looks in (("batch", each.batches), ("held out", each.heldout)):
            told = {step: r for step, look in looks.items() if (r := look.record())["witness"] is not None}
            if not told:
                continue
            mean = [r["witness"] for r in told.values()]
            half = [np.nan if r["witness_ci"] is None else r["witness_ci"] for r in told.values()]
            name = ", ".join([*([run.name] if len(runs) > 1 else []), each.by, kind])
            look = style_of(2 * i + (kind == "batch"))
            below.errorbar(list(told), mean, half, label=name.replace("$", r"\$"), capsize=3, **look)
            rows += [
                [run.name, "witness", kind, each.by, step, r["witness"], r["witness_ci"], looks[step].spoke]
                for step, r in told.items()
            ]
        if each.spoke:
            for axes in (above, below):
                axes.axvline(each.spoke.step, color=style_of(2 * i)["color"], linestyle=":")
    above.set(ylabel="training reward")
    below.set(xlabel="online batches", ylabel="witness")
    below.legend(fontsize=8)
    return rows
