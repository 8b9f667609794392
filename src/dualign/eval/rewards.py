"""Mean reward of policies (ICLR Figure 7), and whether a gain survives another judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualign.common.intervals import bracket, too_few
from dualign.eval.asking import in_words
from dualign.eval.judges import Judge, score
from dualign.eval.outputs import Answer, Outputs
from dualign.eval.result import Column, Json, Table
from dualign.eval.statistics import correlation, t_interval

SHOWN = 20  # disagreements that are listed

Scored = dict[str, list[float | None]]  # by prompt, an entry per answer


def scored(judge: Judge, points: Sequence[Outputs]) -> list[Scored]:
    """Every answer of every point, labelled in one go: a judge's requests run side by side."""
    flat = [(p, key, a) for p, point in enumerate(points) for key, answers in point.answers.items() for a in answers]
    labels = score(judge, [answer for *_, answer in flat])
    found: list[Scored] = [{} for _ in points]
    for (p, key, _), label in zip(flat, labels, strict=True):
        found[p].setdefault(key, []).append(label.value)
    return found


def means(values: Scored) -> dict[str, float]:
    """Mean over each prompt's labelled answers."""
    present = {key: [v for v in vs if v is not None] for key, vs in values.items()}
    return {key: float(np.mean(vs)) for key, vs in present.items() if vs}


def curve(points: Sequence[Outputs], values: Sequence[Scored]) -> list[dict[str, Any]]:
    """Per point: mean reward, and the paired gain over the first point, also in standard deviations of its rewards."""
    start = means(values[0])
    sd = spread(values[0])
    table = []
    for point, v in zip(points, values, strict=True):
        mean = means(v)
        gain = t_interval([mean[k] - start[k] for k in mean if k in start])
        absent = sum(x is None for xs in v.values() for x in xs)
        table.append({"name": point.name, "batches": point.batches, "labels": point.labels,
                      "reward": t_interval(list(mean.values())).record(), "gain": gain.record(),
                      "gain_sd": gain.value / sd if sd else None, "absent": absent})  # fmt: skip
    return table


def spread(values: Scored) -> float:
    """Standard deviation over answers."""
    every = [v for vs in values.values() for v in vs if v is not None]
    return float(np.std(every, ddof=1)) if len(every) > 1 else 0.0


def swap(points: Sequence[Outputs], first: Sequence[Scored], second: Sequence[Scored]) -> dict[str, Any]:
    """The same answers under two judges: correlation over all answers, within the last point, and of the gains; and the
    prompts on which the two disagree most about whether the last point is better than the first."""
    both = [_paired(a, b) for a, b in zip(first, second, strict=True)]
    every = [pair for pairs in both for pair in pairs]
    gains = _gains(first), _gains(second)
    common = [k for k in gains[0] if k in gains[1]]
    result: dict[str, Any] = {
        "all": correlation([x for x, _ in every], [y for _, y in every]),
        "last": correlation([x for x, _ in both[-1]], [y for _, y in both[-1]]),
        "gains": correlation([gains[0][k] for k in common], [gains[1][k] for k in common]),
    }
    if len(points) > 1:
        result |= {"survives": survival(gains[1]), "disagreements": _disagreements(points, common, *gains)}
    return result


def survival(second_gain: dict[str, float]) -> str:
    """Does the gain show under the second judge?"""
    gain = t_interval(list(second_gain.values()))
    if few := too_few(gain.n):
        return few
    return "yes" if gain.low > 0 else "no: it fell" if gain.high < 0 else "not clearly"


def _gains(values: Sequence[Scored]) -> dict[str, float]:
    """Per prompt: the last point's mean less the first's, in standard deviations of the first's rewards."""
    start, end, sd = means(values[0]), means(values[-1]), spread(values[0]) or 1.0
    return {key: (end[key] - start[key]) / sd for key in end if key in start}


def _paired(a: Scored, b: Scored) -> list[tuple[float, float]]:
    return [
        (x, y) for key in a for x, y in zip(a[key], b.get(key, ()), strict=False) if x is not None and y is not None
    ]


def _disagreements(
    points: Sequence[Outputs], keys: Sequence[str], one: dict[str, float], two: dict[str, float]
) -> list[dict[str, Any]]:
    opposed = sorted((k for k in keys if one[k] * two[k] < 0), key=lambda k: -min(abs(one[k]), abs(two[k])))
    before, after = points[0].answers, points[-1].answers

    def text(answers: tuple[Answer, ...]) -> str:
        return answers[0].text

    return [
        {"id": after[k][0].prompt.id, "prompt": after[k][0].prompt.text, "before": text(before[k]),
         "after": text(after[k]), "first_gain_sd": one[k], "second_gain_sd": two[k]}
        for k in opposed[:SHOWN]
    ]  # fmt: skip


# --- what people see ---

COLUMNS = [
    Column("policy"), Column("labels"), Column("reward [95 %]", "{:+.3f}"),
    Column("gain over the first [95 %]", "{:+.3f}"), Column("gain in sd", "{:+.2f}"), Column("absent"),
]  # fmt: skip
SWAP = [
    Column("r of all answers", "{:.2f}"), Column("of the last policy's", "{:.2f}"), Column("of the gains", "{:.2f}"),
    Column("gain survives"), Column("disagreements"),
]  # fmt: skip


def tables(record: Json) -> list[Table]:
    """Of each system: its points under each judge, and what two judges agree on."""
    found = []
    for system in record["systems"]:
        whose = {"source": system.get("source"), "run": system.get("run")}
        for key, which in (("points", "judge"), ("second_points", "second_judge")):
            if key in system:
                rows = [
                    [p["name"], p["labels"], p["reward"], p["gain"], p["gain_sd"], p["absent"]] for p in system[key]
                ]
                about = {"judge": _judge(record, system, which)}
                notes = [in_words(system | {"judge": system.get(which)})]
                found.append(Table("Mean reward", COLUMNS, rows, notes, about=about, over="policy", **whose))
        if swap := system.get("swap"):
            about = {"judge": _judge(record, system, "judge"), "second": _judge(record, system, "second_judge")}
            r = [swap[what] | {"value": swap[what]["pearson"]} for what in ("all", "last", "gains")]
            listed = swap.get("disagreements", ())
            notes = []
            if "survives" in swap:
                told = f"does the gain survive the second judge? {swap['survives']}; "
                notes = [f"{told}{len(listed)} disagreements listed in the file"]
            row = [*r, swap.get("survives"), len(listed)]
            found.append(Table("Gain under two judges", SWAP, [row], notes, about=about, **whose))
    return found


def headline(record: Json) -> str:
    """Each system's gain, and whether it survives."""
    found = []
    for system in record["systems"]:
        whose = f"{system['source']}: " if len(record["systems"]) > 1 else ""
        survives = system.get("swap", {}).get("survives")
        under = f", under the second judge: {survives}" if survives else ""
        found.append(f"{whose}gain {bracket(system['points'][-1]['gain'], '{:+.3f}')}{under}")
    return "; ".join(found)


def _judge(record: Json, system: Json, which: str) -> str:
    """Its name, and whether it is the run's own; a result of an earlier version has what was said on the command
    line."""
    spec = str(record["judge"].get(which.removesuffix("_judge"), "–"))
    name = (system.get(which) or {}).get("name", spec)
    return f"run: {name}" if spec == "run" and name != spec else name
