"""Win rates with everything that tells whether to believe them (ICLR Tables 1-3, Figures 3 and 6; v1 Figure 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dualign.common.errors import UserError
from dualign.common.intervals import FEW, bracket, too_few
from dualign.eval.asking import in_words
from dualign.eval.bias import Errors
from dualign.eval.judges import Judge, Pair, judge_pairs
from dualign.eval.length import by_length, length_controlled
from dualign.eval.outputs import Outputs
from dualign.eval.result import Column, Json, Plot, Table
from dualign.eval.statistics import over_seeds, share


def sides(source: str, points: list[Outputs], other: Outputs | None) -> tuple[list[Outputs], Outputs]:
    """What of `source` is judged, and against what: `other`, or its own π_0. Raises UserError where neither exists."""
    if other is not None:
        return [p for p in points if p.batches != 0] or points, other
    if points[0].batches != 0:
        raise UserError(f"{source}: against what? name it with --against (only a run knows its π_0)")
    if len(points) == 1:
        raise UserError(f"{source}: nothing beside π_0 to judge: the run has no later evaluation or checkpoint")
    return points[1:], points[0]


def per_prompt(pairs: Sequence[Pair]) -> dict[str, float]:
    """Mean score of a on each prompt that has a verdict: the independent draws."""
    found: dict[str, list[float]] = {}
    for pair in pairs:
        if pair.value is not None:
            found.setdefault(pair.key, []).append(pair.value)
    return {key: float(np.mean(values)) for key, values in found.items()}


def measure(
    a: Outputs, b: Outputs, pairs: Sequence[Pair], seed: int = 0, errors: Errors | None = None
) -> dict[str, Any]:
    """One point: the win rate of a over b, raw and (from FEW prompts on) length-controlled and by length, and how
    consistent the judge was; with the judge's `errors` also the win rate that people would give."""
    judged = [p for p in pairs if p.value is not None]
    score = per_prompt(pairs)
    chars_a, chars_b = (_mean_chars(judged, side) for side in ("a", "b"))
    values, long_a, long_b = ([d[k] for k in score] for d in (score, chars_a, chars_b))
    control = length_controlled(values, long_a, long_b, seed)
    rate = share(values, seed)
    corrected = (
        {"corrected": errors.corrected(rate).record(), "judge_errors": asdict(errors)} if errors and score else {}
    )
    won, lost = (sum(p.value == v for p in judged) for v in (1.0, 0.0))
    return {
        "a": a.name, "b": b.name, "batches": a.batches, "labels": a.labels,
        "win_rate": rate.record(), **corrected,
        "length_controlled": control.win_rate.record(), "length_slope": control.slope.record(),
        "won": won, "tied": len(judged) - won - lost, "lost": lost, "absent": len(pairs) - len(judged),
        "absent_reasons": sorted({p.reason for p in pairs if p.reason})[:5],
        "chars_a": float(np.mean(long_a)) if score else None, "chars_b": float(np.mean(long_b)) if score else None,
        "by_length": by_length(values, long_a, long_b) if len(score) >= FEW else [], **consistency(pairs),
    }  # fmt: skip


def consistency(pairs: Sequence[Pair]) -> dict[str, float | None]:
    """Of pairs asked in both orders: the share on which they name the same answer, and how often the answer shown
    first is named (0.5: no position bias). None for rewards, which see one answer at a time."""
    asked = [(p.orders, p.named_first) for p in pairs if p.orders and p.named_first is not None]
    if not asked:
        return {"swap_consistency": None, "first_named": None}
    same = np.mean([ab == ba for (ab, ba), _ in asked])
    first = np.mean([named for _, named in asked])
    return {"swap_consistency": float(same), "first_named": float(first)}


def _mean_chars(pairs: Sequence[Pair], side: str) -> dict[str, float]:
    found: dict[str, list[int]] = {}
    for pair in pairs:
        found.setdefault(pair.key, []).append(len(getattr(pair, side).text))
    return {key: float(np.mean(lengths)) for key, lengths in found.items()}


def curve(
    judge: Judge, points: Sequence[Outputs], b: Outputs, seed: int, errors: Errors | None = None
) -> tuple[list[dict[str, Any]], list[list[Pair]]]:
    """Every point against b."""
    pairs = [judge_pairs(judge, a, b) for a in points]
    return [measure(a, b, found, seed, errors) for a, found in zip(points, pairs, strict=True)], pairs


def across_seeds(pairs_Sp: Sequence[Sequence[Pair]]) -> dict[str, Any]:
    """The last points of several runs, as seeds of one system."""
    between, prompts = over_seeds([per_prompt(pairs) for pairs in pairs_Sp])
    return {"over_seeds": between.record(), "over_prompts": prompts.record()}


def row(point: str, pair: Pair) -> dict[str, Any]:
    """One comparison for the file of verdicts."""
    return {"point": point, "id": pair.prompt.id, "prompt": pair.prompt.messages, "a": pair.a.text, "b": pair.b.text,
            "value": pair.value, "orders": pair.orders, "scores": pair.scores, "reason": pair.reason,
            "note": pair.note}  # fmt: skip


# --- what people see ---

SHARE = ("{:.1%}", "{:.0%}")
COLUMNS = [
    Column("policy"), Column("labels"), Column("win rate [95 %]", *SHARE), Column("prompts"),
    Column("length-controlled [95 %]", *SHARE), Column("won/tied/lost"), Column("absent"),
    Column("characters", "{:.0f}"), Column("orders agree", "{:.0%}"),
]  # fmt: skip
PLOT = Plot("winrate", "labels", ("win rate [95 %]", "length-controlled [95 %]"), "Win rate",
            "Win rate against labels bought, raw and length-controlled", line=0.5)  # fmt: skip


def tables(record: Json, what: str = "Win rate") -> list[Table]:
    """Of each system: its points, and the last one's win rate by length; and the mean over systems where there is
    one."""
    found = []
    for system in record["systems"]:
        last = system["points"][-1]
        whose = {"source": system.get("source"), "run": system.get("run"), "about": {
            "judge": (system.get("judge") or record["judge"])["name"], "against": last["b"]}}  # fmt: skip
        rows = [
            [p["a"], p["labels"], p["win_rate"], p["win_rate"]["n"], p["length_controlled"],
             (p["won"], p["tied"], p["lost"]), p["absent"], (p["chars_a"], p["chars_b"]), p["swap_consistency"]]
            for p in system["points"]
        ]  # fmt: skip
        few = too_few(last["win_rate"]["n"])
        notes = [*([f"no length control: {few}"] if few else []), *_cost(system), in_words(system)]
        found.append(Table(f"{what} against {last['b']}", COLUMNS, rows, notes, over="policy", plot=PLOT, **whose))
        if "corrected" in last:
            found.append(_corrected(f"{what} against {last['b']}", system["points"], whose))
        if last["by_length"]:
            lengths = [[f"{r['longer_from']:+d} .. {r['longer_to']:+d}", r, r["n"]] for r in last["by_length"]]
            columns = [Column("longer by"), Column("win rate [95 %]", *SHARE), Column("prompts")]
            found.append(Table(f"{what} against {last['b']}, by characters", columns, lengths, **whose))
    if "seeds" in record:
        columns = [Column("sources"), Column("between seeds [95 %]", *SHARE), Column("over prompts [95 %]", *SHARE)]
        row = [len(record["systems"]), record["seeds"]["over_seeds"], record["seeds"]["over_prompts"]]
        found.append(Table(f"{what}, mean over the sources", columns, [row]))
    return found


def _corrected(title: str, points: Sequence[Json], whose: Json) -> Table:
    columns = [Column("policy"), Column("by the judge [95 %]", *SHARE), Column("by people, estimated [95 %]", *SHARE)]
    rows = [[p["a"], p["win_rate"], p.get("corrected")] for p in points]
    errors = points[-1]["judge_errors"]
    note = f"the judge sides with people on {errors['agrees']:.1%} of {errors['n']:,} pairs (--judge-errors)"
    return Table(f"{title}, corrected for the judge's errors", columns, rows, [note], over="policy", **whose)


def headline(record: Json) -> str:
    """Of several systems the mean, where they have one."""
    one, *others = record["systems"]
    if not others:
        return of_point(one["points"][-1])
    if "seeds" not in record:
        return "no mean over the sources: each is judged by its own reward, and they differ"
    seeds, prompts = (bracket(record["seeds"][key], *SHARE) for key in ("over_seeds", "over_prompts"))
    return f"mean of {len(others) + 1} sources: {seeds} between seeds, {prompts} over prompts"


def of_point(point: Json) -> str:
    """One win rate in words."""
    raw = f"raw {bracket(point['win_rate'], '{:.1%}')} against {point['b']}"
    if few := too_few(point["win_rate"]["n"]):
        return f"{raw}; no length control: {few}"
    return f"length-controlled {bracket(point['length_controlled'], '{:.1%}')}, {raw}"


def _cost(system: Json) -> list[str]:
    """What a run's labels cost, and a point of its win rate; nothing of what is no run."""
    if "cost" not in system:
        return []
    cost, each, n = system["cost"], system["cost_per_point"], system["points"][-1]["win_rate"]["n"]
    spent = f"{cost['labels']:,} labels, {cost['calls']:,} judge calls, {cost['tokens']:,} tokens"
    text = f"cost: {spent}, ${cost['dollars']:.2f}, {cost['hours']:.2f} h"
    if each is None:
        return [f"{text}; no cost per point of win rate: {too_few(n)}"]
    if each["labels"] is None:
        return [f"{text}; the win rate is not above 50 %"]
    price = f"{each['labels']:.0f} labels, {each['tokens']:.0f} tokens, ${each['dollars']:.4f}, {each['hours']:.3f} h"
    return [f"{text}; for each point of win rate above 50 %: {price}"]
