"""What a run's labels cost, and what a point of win rate cost (v1's comparison of AI reward with AI preference)."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

from dualign.annotate.budget import account
from dualign.annotate.endpoints import SPENT
from dualign.common.errors import UserError
from dualign.common.intervals import FEW
from dualign.eval.outputs import is_run


def cost_of(folder: Path) -> dict[str, Any]:
    """Labels, judge calls, tokens, dollars and hours of a run. Calls and tokens are 0 where labels cost nothing (reward
    heads, functions): what the account of bought labels says, retries and other runs' cache hits not included."""
    from dualign.run.folder import Run

    metrics = Run.open(folder).metrics()
    try:
        calls, prompt, completion, picodollars = account(folder / SPENT)
    except sqlite3.Error as error:
        raise UserError(f"{folder / SPENT}: the account of bought labels cannot be read: {error}") from None
    return {
        "run": folder.name,
        "labels": max((int(m["labels"]) for m in metrics), default=0),
        "calls": calls, "tokens": prompt + completion, "dollars": picodollars / 1e12,
        "hours": sum(sum(m["seconds"].values()) for m in metrics) / 3600,
    }  # fmt: skip


def of_system(source: str, point: dict[str, Any]) -> dict[str, Any]:
    """The cost of a run, and per point of the win rate of `point` (None of fewer than FEW prompts); nothing for what is
    no run."""
    if not is_run(source):
        return {}
    cost, rate = cost_of(Path(source)), point["win_rate"]
    return {"cost": cost, "cost_per_point": per_point(cost, rate["value"]) if rate["n"] >= FEW else None}


def per_point(cost: dict[str, Any], win_rate: float) -> dict[str, Any]:
    """Each cost divided by the percentage points that the win rate lies above 50 %; None where it does not."""
    points = 100 * (win_rate - 0.5)
    return {k: v / points if points > 0 else None for k, v in cost.items() if k != "run"}
