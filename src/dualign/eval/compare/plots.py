"""Figures for a paper, each as PNG and SVG. matplotlib is needed here alone (the `plots` extra)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dualign.common.errors import UserError
from dualign.eval.compare.pareto import fit
from dualign.eval.compare.results import Mean, Result, distances, finals, mean_curve

MARKERS = "osD^vP*XhpdH8<>"
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.fonttype": "none"}
KEYS = {
    "reward": "held-out reward",
    "kl": "log(π/π_0), nats",
    "length": "length, tokens",
    "missing_eos": "missing EOS, share",
    "distinct": "different completions, share",
}
WIDTH, HEIGHT = 4.2, 3.2  # inches, of one panel


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """All figures that the results allow; returns the PNGs. Raises UserError where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        raise UserError(
            "figures need matplotlib: pip install 'dualign[plots]' (the table and the CSVs are written)"
        ) from None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(STYLE)
    plain = [r for r in results if r.cell.axis is None]
    moved = [r for r in results if r.cell.axis is not None]
    drawn = []
    if any(r.curve for r in plain):
        drawn += [_save(curves(plain), folder / "curves"), _save(behaviour(plain), folder / "behaviour")]
    for axis in dict.fromkeys(r.cell.axis for r in moved if r.last):
        here = [r for r in moved if r.cell.axis == axis]
        drawn.append(_save(ablation(here, str(axis)), folder / f"ablation-{axis}"))
    if any(r.last for r in results):
        drawn.append(_save(pareto(plain, moved), folder / "pareto"))
    if results:
        drawn.append(_save(batch_seconds(results), folder / "seconds"))
    return drawn


def curves(results: Sequence[Result]) -> Any:
    """Held-out reward against labels bought and against wall-clock; thin lines are single seeds (intervals of two
    or three are wider than the figure; the table has them). Systems on a fixed set buy no labels: dashed, at their
    final reward."""
    figure, (left, right) = _panels(2)
    for name, look, seeds in _looks(results):
        mean = [p for p, _ in mean_curve(seeds)]
        if not mean:
            continue
        thin = {"color": look["color"], "lw": 0.6, "alpha": 0.4}
        for points, style in ((mean, {"ms": 3, "lw": 1.5, **look}), *((r.curve, thin) for r in seeds)):
            reward = [p.reward for p in points]
            label = name if points is mean else None
            if seeds[0].online:
                left.plot([p.labels for p in points], reward, label=label, **style)
            elif points is mean:
                left.axhline(reward[-1], ls="--", lw=1, color=look["color"], label=label)
            right.plot([p.seconds / 60 for p in points], reward, **style)
    left.set(xlabel="labels bought", ylabel="held-out reward")
    right.set(xlabel="training time, minutes", ylabel="held-out reward")
    return _legend(figure, left)


def behaviour(results: Sequence[Result]) -> Any:
    """KL to π_0, length, missing EOS and different completions along training."""
    figure, axes = _panels(4)
    names = _names(results)
    for name, look, seeds in _looks(results):
        points = [p for p, _ in mean_curve(seeds)]
        for axis, (key, label) in zip(axes, list(names.items())[1:], strict=True):
            axis.plot([p.batches for p in points], [getattr(p, key) for p in points], label=name, ms=3, lw=1.2, **look)
            axis.set(xlabel="online batches", ylabel=label)
    return _legend(figure, axes[0])


def ablation(results: Sequence[Result], axis: str) -> Any:
    """Final reward, KL, length, missing EOS and different completions against one setting."""
    figure, panels = _panels(len(KEYS))
    names = _names(results)
    numbers = all(isinstance(r.cell.value, int | float) for r in results)
    found = {str(r.cell.value): r.cell.value for r in results}
    values = sorted(found, key=lambda v: found[v]) if numbers else list(found)
    for name, look, seeds in _looks(results):
        for panel, (key, label) in zip(panels, names.items(), strict=True):
            means = [Mean.of(getattr(r.last, key) for r in seeds if str(r.cell.value) == v and r.last) for v in values]
            known = [(i, m) for i, m in enumerate(means) if m]
            panel.errorbar(
                [i for i, _ in known], [m.value for _, m in known], yerr=[np.nan_to_num(m.half) for _, m in known],
                capsize=3, ms=4, lw=1.2, label=name, **look,
            )  # fmt: skip
            panel.set(xlabel=axis, ylabel=label)
            panel.set_xticks(range(len(values)), values)
    return _legend(figure, panels[0])


def pareto(plain: Sequence[Result], moved: Sequence[Result]) -> Any:
    """Reward against KL to π_0 (left) and against the α-interpolated KL (right). With a sweep: the final reward of each
    setting, a second-order fit of each axis, and a dashed line at the first one's peak (ICLR 2026, Fig. 4). Without:
    each system's way through training."""
    figure, panels = _panels(2)
    labels = dict(zip(("kl", "kl_interpolated"), (f"{d}, nats" for d in distances([*plain, *moved])), strict=True))
    lines = _looks(moved, _system_and_axis) if moved else _looks(plain)
    for first, (name, look, seeds) in enumerate(lines):
        points = finals(seeds) if moved else [p for p, _ in mean_curve(seeds)]
        for panel, (key, label) in zip(panels, labels.items(), strict=True):
            x, y = [getattr(p, key) for p in points], [p.reward for p in points]
            panel.plot(x, y, label=name, ms=4, lw=1.2, **(look | {"ls": ""} if moved else look))
            panel.set(xlabel=label, ylabel="held-out reward")
            # where the axis is α itself, α·KL is no measure of anything along it
            found = fit(x, y) if moved and (key == "kl" or seeds[0].cell.axis != "algo.alpha") else None
            if found:
                grid = np.linspace(found.low, found.high, 50)
                panel.plot(grid, found.at(grid), lw=1.2, color=look["color"])
                if first == 0:
                    panel.axhline(found.peak_reward, ls="--", lw=0.8, color=look["color"])
    return _legend(figure, panels[0])


def batch_seconds(results: Sequence[Result]) -> Any:
    """Seconds of one online batch by system and setting (ICLR 2026, Table 8)."""
    figure, (panel,) = _panels(1)
    once = {r.cell.folder: r for r in reversed(results)}.values()  # runs that several axes share
    means = [
        (name, look, Mean.of(r.batch_seconds for r in seeds)) for name, look, seeds in _looks([*once][::-1], _setting)
    ]
    figure.set_figheight(max(HEIGHT, 0.2 * len(means)))
    bars = sorted(((mean, name, look) for name, look, mean in means if mean), key=lambda bar: bar[0].value)
    for i, (mean, _, look) in enumerate(bars):
        panel.barh(i, mean.value, xerr=np.nan_to_num(mean.half), color=look["color"], capsize=2)
    panel.set_yticks(range(len(bars)), [name for _, name, _ in bars])
    panel.set(xlabel="seconds per online batch")
    return figure


def _names(results: Sequence[Result]) -> dict[str, str]:
    return KEYS | {"kl": f"{distances(results)[0]}, nats"}


def _system(r: Result) -> str:
    return r.cell.system


def _system_and_axis(r: Result) -> str:
    return f"{r.cell.system}, {r.cell.axis}"


def _setting(r: Result) -> str:
    return r.cell.system + (f", {r.cell.axis} = {r.cell.value}" if r.cell.axis else "")


def _looks(
    results: Sequence[Result], line: Callable[[Result], str] = _system
) -> list[tuple[str, dict[str, Any], list[Result]]]:
    """(name, colour and marker, its results) of every line; the same system looks the same in every figure of a
    report."""
    import matplotlib

    names = list(dict.fromkeys(map(line, results)))
    colours: Any = matplotlib.colormaps["tab10" if len(names) <= 10 else "tab20"]
    palette = colours.colors
    return [
        (
            name,
            {"color": palette[i % len(palette)], "marker": MARKERS[i % len(MARKERS)], "ls": "-"},
            [r for r in results if line(r) == name],
        )
        for i, name in enumerate(names)
    ]


def _panels(count: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH * count, HEIGHT), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(1, count)))
    for axis in axes:
        axis.grid(alpha=0.25, lw=0.5)
    return figure, axes


def _legend(figure: Any, axis: Any) -> Any:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 6) or 1, frameon=False)
    return figure


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(f"{path}.svg")
    figure.set_layout_engine("none")  # what is laid out stays so
    figure.savefig(f"{path}.png", dpi=200)
    return Path(f"{path}.png")
