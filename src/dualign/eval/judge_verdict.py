"""Is this judge any good? The rules of the verdict in words (docs/judges.md)."""

from __future__ import annotations

from typing import Any

from dualign.common.intervals import FEW, bracket, known

POINTS = "{:+.1f}"
ABSENT = 0.05  # of the pairs, above which missing labels are named


def verdict(record: dict[str, Any], rows: int) -> list[str]:
    """Of one labeller of `dualign agreement`, a line for each thing that a person should know; the first says whether
    to use it. Nothing of the longer answer and of people."""
    gain = record.get("over_length")
    if gain is None:
        return []
    name, n = record["labeller"], record["pairs"]
    if n < FEW:
        return [f"{name}: {n} pairs are too few for a verdict ({FEW} are needed)"]
    return [f"{name}: {_use(record, gain)}", *(f"{name}: {line}" for line in _warnings(record, rows))]


def _use(record: dict[str, Any], gain: dict[str, Any]) -> str:
    share = f"agrees with people on {bracket(record | {'value': record['share']}, '{:.1%}')}"
    rule = f"the {record['rule']} answer"
    if not record["low"] > 0.5:
        return f"do not use: it {share}, no better than a coin"
    if known(gain["low"]) and gain["low"] > 0:
        return f"usable: it {share}, {_points(gain)} points over {rule}"
    if known(gain["high"]) and gain["high"] < 0:
        return f"do not use: it {share}, less often than {rule} does ({_points(gain)} points)"
    return f"use with care: it {share}, but not clearly more often than {rule} does ({_points(gain)} points)"


def _warnings(record: dict[str, Any], rows: int) -> list[str]:
    found = []
    first, longer, own = record["named_first"], record["length_bias"], record["own_bias"]
    if _apart(first, 0.5):
        side = "first" if first["value"] > 0.5 else "second"
        found.append(
            f"position bias: {bracket(first, '{:.1%}')} of its answers name the first; do not use it in one order alone, "
            f"which favours the {side}"
        )
    if _apart(longer, 0.0):
        which = "longer" if longer["value"] > 0 else "shorter"
        found.append(
            f"length bias: {_points(longer)} points towards the longer answer beyond people; do not use it to compare "
            f"answers of different lengths without length control, which favours the {which}"
        )
    if _apart(own, 0.0) and own["value"] > 0:
        found.append(
            f"self-preference: {_points(own)} points towards its own model's answers beyond people; do not use it to "
            "compare that model with others"
        )
    absent = record["absent"] / rows if rows else 0.0
    if absent > ABSENT:
        found.append(f"{absent:.0%} of the pairs have no label from it; what it says is of the rest")
    return found


def _apart(estimate: dict[str, Any] | None, even: float) -> bool:
    """Whether the whole interval is on one side of `even`."""
    if estimate is None or not (known(estimate["low"]) and known(estimate["high"])) or estimate["n"] < FEW:
        return False
    return bool(estimate["low"] > even or estimate["high"] < even)


def _points(estimate: dict[str, Any]) -> str:
    return bracket({k: 100 * v if k != "n" else v for k, v in estimate.items()}, POINTS)
