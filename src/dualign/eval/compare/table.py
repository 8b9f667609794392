"""The comparison as a table: one row per system (and setting), means ± 95 % t-intervals over seeds."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dualign.eval.compare.results import Mean, Result, groups, labels_to_reach, mean_curve, reward_at

COLUMNS = {  # column: (heading, format)
    "reward": ("held-out reward", "{:.3f}"),
    "gain_sd": ("gain, σ of π_0", "{:.2f}"),
    "kl": ("KL(π_θ‖π_0), nats", "{:.2f}"),
    "kl_interpolated": ("α-interpolated KL", "{:.2f}"),
    "length": ("length, tokens", "{:.1f}"),
    "missing_eos": ("missing EOS", "{:.1%}"),
    "distinct": ("different completions", "{:.0%}"),
    "labels": ("labels bought", "{:.0f}"),
    "batch_seconds": ("s / online batch", "{:.2f}"),
}


@dataclass(frozen=True)
class Row:
    system: str
    setting: str  # "" or "key = value"
    seeds: int
    online: bool
    means: dict[str, Mean | None]  # by COLUMNS
    at_kl: dict[float, Mean | None]  # reward where a run first came to so many nats of KL to π_0
    at_reward: dict[float, Mean | None]  # labels until a run first reached that reward, of the runs that did
    to_reference: float | None  # labels until the reference system's final reward; None: never, or fixed data


def rows(
    results: Sequence[Result], reference: str | None, at_kl: Sequence[float] = (), at_reward: Sequence[float] = ()
) -> list[Row]:
    """Rows in the grid's order. `reference`: the system to whose mean final reward labels are counted, on the mean
    curve over seeds."""
    target = target_reward(results, reference)
    found = []
    for (system, axis, value), seeds in groups(results).items():
        reach = None
        if target is not None and seeds[0].online:
            reach = labels_to_reach([p for p, _ in mean_curve(seeds)], target)
        setting = f"{axis} = {value}" if axis else ""
        means = {name: Mean.of((_value(r, name) for r in seeds), name == "labels") for name in COLUMNS}
        equal_kl = {kl: Mean.of(reward_at(r.curve, kl) for r in seeds) for kl in at_kl}
        online = [r for r in seeds if r.online]
        labels = {level: Mean.of(labels_to_reach(r.curve, level) for r in online) for level in at_reward}
        found.append(Row(system, setting, len(seeds), seeds[0].online, means, equal_kl, labels, reach))
    return found


def target_reward(results: Sequence[Result], reference: str | None) -> float | None:
    final = Mean.of(r.last.reward for r in results if r.cell.system == reference and r.last)
    return final.value if final else None


def _value(r: Result, name: str) -> float | None:
    if name == "batch_seconds":
        return r.batch_seconds
    if name == "labels":
        return float(r.summary["labels"]) if r.online else None
    if name == "gain_sd":
        return r.gain_sd
    return float(getattr(r.last, name)) if r.last else None


def markdown(table: Sequence[Row], reference: str | None, distances: tuple[str, str] | None = None) -> str:
    """A Markdown table for documents. `distances`: what KL and α-interpolated KL are, where they are something else."""
    settings = any(row.setting for row in table)
    headings = {name: h for name, (h, _) in COLUMNS.items()}
    if distances:
        headings |= {"kl": f"{distances[0]}, nats", "kl_interpolated": distances[1]}
    heading = ["system", *(["setting"] if settings else []), "seeds", *headings.values()]
    heading += [f"reward at KL {kl:g}" for kl in (table[0].at_kl if table else ())]
    heading += [f"labels to reward {level:g}" for level in (table[0].at_reward if table else ())]
    heading += [f"labels to {reference}'s final reward"] if reference else []
    lines = [heading, ["---"] * len(heading)]
    for row in table:
        cells = [row.system, *([row.setting] if settings else []), str(row.seeds)]
        cells += [_text(row.means[name], form, row.seeds) for name, (_, form) in COLUMNS.items()]
        cells += [_text(mean, COLUMNS["reward"][1], row.seeds) for mean in row.at_kl.values()]
        cells += [_text(mean, COLUMNS["labels"][1], row.seeds) for mean in row.at_reward.values()]
        cells += [_reach(row)] if reference else []
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _text(mean: Mean | None, form: str, seeds: int) -> str:
    if mean is None:
        return "–"
    half = "" if np.isnan(mean.half) or mean.half == 0 else " ± " + form.format(mean.half)
    return form.format(mean.value) + half + (f" ({mean.n} of {seeds})" if mean.n < seeds else "")


def _reach(row: Row) -> str:
    if row.to_reference is not None:
        return f"{row.to_reference:.0f}"
    return "not reached" if row.online else "fixed data"


def table_csv(table: Sequence[Row]) -> str:
    """The same for programs: mean and half width of each column apart."""
    columns = [*COLUMNS, *(f"reward_at_kl_{kl:g}" for kl in (table[0].at_kl if table else ()))]
    columns += [f"labels_to_reward_{level:g}" for level in (table[0].at_reward if table else ())]
    names = [n for column in columns for n in (column, f"{column}_ci")]
    lines: list[Sequence[object]] = [["system", "setting", "seeds", *names, "labels_to_reference"]]
    for row in table:
        numbers: list[object] = []
        for mean in (*row.means.values(), *row.at_kl.values(), *row.at_reward.values()):
            numbers += ["", ""] if mean is None else [mean.value, "" if np.isnan(mean.half) else mean.half]
        reach = "" if row.to_reference is None else row.to_reference
        lines.append([row.system, row.setting, row.seeds, *numbers, reach])
    return _csv(lines)


def curves_csv(results: Sequence[Result]) -> str:
    """Every evaluation of every run."""
    fields = ("batches", "labels", "seconds", "reward", "kl", "length", "missing_eos", "distinct")
    lines: list[Sequence[object]] = [["system", "axis", "value", "seed", *fields]]
    for r in results:
        start = [r.cell.system, r.cell.axis or "", "" if r.cell.axis is None else r.cell.value, r.cell.seed]
        lines += [[*start, *(getattr(p, f) for f in fields)] for p in r.curve]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()
