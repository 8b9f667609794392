"""What each figure plots. A plot draws on an empty figure and returns its numbers, a header first; None: no data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dualign.annotate.normalised import RAW
from dualign.eval.report.data import Json, RunData, evenly, heldout_kl_name
from dualign.eval.report.style import COLOURS, Plot, Rows, legend, series, style_of
from dualign.eval.report.witness import witness
from dualign.training.heldout import kl_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Series = tuple[np.ndarray, np.ndarray]
HATCHES = ("", "//", "..", "xx", "--", "++")


def _lines(
    axes: Axes, runs: Sequence[RunData], key: str, label: str, training: Callable[[RunData], Series] | None = None
) -> Rows:
    """A line over batches per run (of `training`, by default the metric `key`), with the held-out means and their
    intervals on top."""
    rows: Rows = [["run", "kind", "batches", key, "half_width_95"]]
    for i, run in enumerate(runs):
        x, y = training(run) if training else series(run.metrics, key)
        name = f"{run.name}, in training" if run.heldout else run.name
        look = style_of(i) | {"markersize": 2.5, "alpha": 0.75, "linewidth": 1.2, "markevery": max(1, len(x) // 12)}
        axes.plot(x, y, label=name if len(runs) == 1 else None, **look)
        rows += [[run.name, "training batch", int(a), b, ""] for a, b in zip(x, y, strict=True)]
        held = [h for h in run.heldout if h.get(key) is not None]
        if held:
            at, mean = [h["batches"] for h in held], [h[key] for h in held]
            half = [np.nan if h.get(f"{key}_ci") is None else h[f"{key}_ci"] for h in held]
            shape = style_of(i) | {"markersize": 6}
            name = f"{run.name}, held out" if len(runs) == 1 else run.name
            axes.errorbar(at, mean, half, label=name, capsize=4, linewidth=2, **shape)
            rows += [
                [run.name, "held out", a, m, "" if np.isnan(h) else h] for a, m, h in zip(at, mean, half, strict=True)
            ]
        elif len(runs) > 1:
            axes.plot([], [], label=run.name, **style_of(i))
    axes.set(xlabel="online batches", ylabel=label)
    legend(axes, runs)
    return rows


def reward(figure: Figure, runs: Sequence[RunData]) -> Rows:
    """The reward itself, in training as on held-out prompts. What training saw of it where a missing EOS costs
    something is another number, in a panel of its own."""
    penalised = [run for run in runs if run.sampling.get("missing_eos_penalty")]
    panels = figure.subplots(2, sharex=True) if penalised else [figure.subplots()]
    rows = _lines(panels[0], runs, "reward", "mean reward", _reward_itself)
    if penalised:
        figure.set_figheight(5.2)
        panels[0].set_xlabel("")
        panels[1].set(xlabel="online batches", ylabel="reward less penalty")
        for run in penalised:
            x, y = series(run.metrics, "reward")
            look = style_of(list(runs).index(run)) | {"markersize": 2.5, "markevery": max(1, len(x) // 12)}
            panels[1].plot(x, y, **look)
            rows += [[run.name, "training batch, less penalty", int(a), b, ""] for a, b in zip(x, y, strict=True)]
    return rows


def _reward_itself(run: RunData) -> Series:
    """The mean reward of training batches, without normalisation and the penalty for a missing EOS. A run of before
    logged it with the penalty alone, from which it follows where every completion had its label."""
    penalty = run.sampling.get("missing_eos_penalty") or 0.0
    found = []
    for m in run.metrics:
        cut = penalty * m["truncated"]
        itself = m.get(f"{RAW}/mean", m.get("reward_unpenalised"))
        if itself is None and m.get("reward") is not None and not (cut and m["absent"]):
            itself = m["reward"] + cut
        if itself is not None:
            found.append((m["step"], itself))
    return np.array([s for s, _ in found]), np.array([float(v) for _, v in found])


def kl(figure: Figure, runs: Sequence[RunData]) -> Rows:
    names = {kl_name(how) for run in runs for how in (run.sampling, run.eval_sampling)}
    return _lines(figure.subplots(), runs, "kl", f"{names.pop() if len(names) == 1 else kl_name({})}, nats")


def length(figure: Figure, runs: Sequence[RunData]) -> Rows:
    return _lines(figure.subplots(), runs, "length", "tokens per completion")


def _of_set(key: str, label: str) -> Plot:
    """What a system on a fixed set shows, in training and on held-out rows, where it was evaluated on such."""

    def plot(figure: Figure, runs: Sequence[RunData]) -> Rows | None:
        some = [run for run in runs if any(h.get(key) is not None for h in run.heldout)]
        return _lines(figure.subplots(), some, key, label) if some else None

    return plot


def missing_eos(figure: Figure, runs: Sequence[RunData]) -> Rows:
    axes = figure.subplots()
    rows = _lines(axes, runs, "truncated", "share cut off")
    axes.set_ylim(-0.03, 1.03)
    return rows


def pareto(figure: Figure, runs: Sequence[RunData]) -> Rows:
    """Reward bought per nat: each run's evaluations in order, the last one large."""
    axes = figure.subplots()
    rows: Rows = [["run", "batches", "kl", "kl_half_width_95", "reward", "reward_half_width_95"]]
    for i, run in enumerate(runs):
        held = [h for h in run.heldout if h.get("kl") is not None and h.get("reward") is not None]
        if not held:
            continue
        x, y = [h["kl"] for h in held], [h["reward"] for h in held]
        axes.plot(x, y, label=run.name, **style_of(i))
        last = held[-1]
        up, along = (np.nan if last[key] is None else last[key] for key in ("reward_ci", "kl_ci"))
        axes.errorbar(x[-1], y[-1], up, along, capsize=4, **style_of(i) | {"markersize": 9})
        for h in evenly(held, 5):
            axes.annotate(
                str(h["batches"]), (h["kl"], h["reward"]), xytext=(5, -11), textcoords="offset points", fontsize=9
            )
        rows += [[run.name, h["batches"], h["kl"], h["kl_ci"], h["reward"], h["reward_ci"]] for h in held]
    axes.set(xlabel=f"{heldout_kl_name(runs)}, nats", ylabel="held-out reward")
    legend(axes, runs)
    return rows


def weights(figure: Figure, runs: Sequence[RunData]) -> Rows | None:
    """Share of a batch's completions by the size of their weight, batch by batch."""
    shown = [run for run in runs if any(len(w) for w in run.weights.values())][:4]
    if not shown:
        return None
    rows: Rows = [["run", "batch", "log10_weight_from", "log10_weight_to", "share"]]
    edges = np.linspace(-6, np.log10(max(w.max() for r in shown for w in r.weights.values() if len(w))) + 0.01, 25)
    grid: Any = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    image: Any = None
    for axes, run in zip(grid, shown, strict=True):
        steps = list(run.weights)
        share_BH = np.array([_shares(run.weights[s], edges) for s in steps])
        at = np.append(np.array(steps) - 0.5, steps[-1] + 0.5)
        image = axes.pcolormesh(
            at, edges, share_BH.T, cmap="cividis", vmin=0, vmax=1 if share_BH.max() > 0.5 else 0.5, rasterized=True
        )
        axes.set(xlabel="online batches", title=run.name if len(runs) > 1 else None)
        axes.grid(False)
        for step, shares in zip(steps, share_BH, strict=True):
            rows += [[run.name, step, *edges[i : i + 2].round(3), round(v, 4)] for i, v in enumerate(shares)]
    grid[0].set_ylabel("weight w, log$_{10}$")
    figure.colorbar(image, ax=list(grid), label="share of the batch")
    return rows


def _shares(weight: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """What lies below the lowest edge is counted in the lowest bin."""
    if not len(weight):
        return np.zeros(len(edges) - 1)
    counts, _ = np.histogram(np.clip(np.log10(weight), edges[0], edges[-1]), edges)
    return counts / len(weight)


def health(figure: Figure, runs: Sequence[RunData]) -> Rows:
    """How many completions carry the update."""
    names = {"clip_rate": "clipped", "ess": "effective sample size", "tied": "in tied groups"}
    axes = figure.subplots()
    rows: Rows = [["run", "share", "batch", "value"]]
    for i, run in enumerate(runs):
        for j, (key, label) in enumerate(names.items()):
            x, y = series(run.metrics, key)
            if not len(x):
                continue
            look = style_of(j if len(runs) == 1 else i) | {
                "linestyle": ["-", "--", ":"][j],
                "markevery": max(1, len(x) // 12),
            }
            axes.plot(x, y, label=label if len(runs) == 1 else f"{run.name}: {label}", **look)
            rows += [[run.name, label, int(a), b] for a, b in zip(x, y, strict=True)]
    axes.set(xlabel="online batches", ylabel="share of the batch", ylim=(-0.03, 1.03))
    if len(rows) > 1:
        axes.legend(fontsize=10 if len(runs) == 1 else 7)
    return rows


def timings(figure: Figure, runs: Sequence[RunData]) -> Rows:
    """Mean seconds per online batch by phase, a bar per run."""
    axes = figure.subplots()
    rows: Rows = [["run", "phase", "seconds_per_batch"]]
    seconds = [_seconds(run.metrics) for run in runs]
    phases = list(dict.fromkeys(p for s in seconds for p in s if s[p] >= 0.01))
    left = np.zeros(len(runs))
    for j, phase in enumerate(phases):
        values = np.array([s.get(phase, 0.0) for s in seconds])
        label = f"{phase} {values[0]:.1f}" if len(runs) == 1 else phase
        look: Json = {"color": COLOURS[j % 6], "hatch": HATCHES[j % 6], "edgecolor": "#ffffff88", "label": label}
        axes.barh(range(len(runs)), values, 0.55, left, **look)
        left += values
        rows += [[run.name, phase, v] for run, v in zip(runs, values, strict=True)]
    axes.set(xlabel="seconds per online batch", yticks=range(len(runs)), yticklabels=[r.name for r in runs])
    axes.set_ylim(-0.6, len(runs) - 0.4)
    if phases:
        axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return rows


def _seconds(metrics: Sequence[Json]) -> dict[str, float]:
    phases = dict.fromkeys(p for m in metrics for p in m["seconds"])
    return {p: float(np.mean([m["seconds"].get(p, 0.0) for m in metrics])) for p in phases}


PLOTS: dict[str, tuple[str, str, Plot]] = {
    "reward": ("Reward", "Mean reward over online batches, and on held-out prompts with 95 % intervals", reward),
    "loss": (
        "Loss",
        "Mean loss of training batches, and of held-out rows with 95 % intervals",
        _of_set("loss", "loss"),
    ),
    "margin": (
        "Margin",
        "Mean margin of chosen over rejected answers, in training and held out",
        _of_set("margin", "margin"),
    ),
    "accuracy": (
        "Accuracy",
        "Share of pairs whose chosen answer is ahead, in training and held out",
        _of_set("accuracy", "share of pairs"),
    ),
    "witness": (
        "Training reward and witness",
        "Means over online batches; dotted: where the witness says that the two part",
        witness,
    ),
    "pareto": ("Reward against KL", "Held-out reward against the distance to π_0; numbers are online batches", pareto),
    "kl": (
        "Distance to π_0",
        "Mean of log π/π_0 over completions, by online batches: KL to the initial policy where sampled at "
        "temperature 1",
        kl,
    ),
    "length": ("Length", "Tokens per completion over online batches", length),
    "missing_eos": ("Completions without EOS", "Share of completions that were cut off", missing_eos),
    "weights": ("Weights", "Share of each batch's completions by the size of their weight", weights),
    "health": ("What carries the update", "Share of clipped weights, effective sample size, tied groups", health),
    "timings": ("Time", "Mean seconds per online batch by phase", timings),
}
