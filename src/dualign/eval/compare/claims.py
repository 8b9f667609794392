"""Differences between systems, seed by seed: what was claimed before the runs, and what they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from scipy import stats

from dualign.common.intervals import all_equal, half_width
from dualign.eval.compare.grid import Claim, Grid
from dualign.eval.compare.results import Point, Result, labels_to_reach, reward_at

LEVEL = 0.05


@dataclass(frozen=True)
class Verdict:
    """`mean`: of the difference over seeds, positive where it is as claimed; `half` the width of its 95 % t-interval, nan
    where there is none. `p` is two-sided, `holm` the same corrected for all claims that were tested beside it."""

    claim: Claim
    seeds: int  # that have both numbers
    mean: float
    half: float
    p: float | None
    holm: float | None = None

    @property
    def answer(self) -> str:
        if self.holm is None or self.holm >= LEVEL:
            return "cannot tell"
        return "yes" if self.mean > 0 else "no: the opposite"


def claims_of(grid: Grid) -> list[Claim]:
    """The grid's own; without any, every system beside the reference, or the first."""
    if grid.claims:
        return list(grid.claims)
    first = grid.reference or next(iter(grid.systems))
    return [Claim(says=f"{name} ends above {first}", more=name, than=first) for name in grid.systems if name != first]


def verdicts(claims: Sequence[Claim], results: Sequence[Result]) -> list[Verdict]:
    """Of each claim, in order; corrected for all that can be tested by Holm's step-down method (1979)."""
    found = [verdict(claim, results) for claim in claims]
    tested = [i for i, each in enumerate(found) if each.p is not None]
    for i, p in zip(tested, holm([found[i].p or 0.0 for i in tested]), strict=True):
        found[i] = Verdict(**{**vars(found[i]), "holm": p})
    return found


def verdict(claim: Claim, results: Sequence[Result]) -> Verdict:
    """By a paired t-test over the seeds that both systems have; of one system alone, against 0."""
    difference = np.array(list(differences(claim, results).values()))
    if not len(difference):
        return Verdict(claim, 0, float("nan"), float("nan"), None)
    p = None if all_equal(difference) else float(stats.ttest_1samp(difference, 0).pvalue)
    return Verdict(claim, len(difference), float(difference.mean()), half_width(difference), p)


def differences(claim: Claim, results: Sequence[Result]) -> dict[int, float]:
    """By seed: by how much it is as claimed."""
    more, less = _numbers(claim, claim.more, results, claim.after), None
    if claim.than is not None:
        less = _numbers(claim, claim.than, results, 1.0)
    sign = -1 if claim.less else 1
    return {
        seed: sign * (value - (less[seed] if less else 0.0))
        for seed, value in more.items()
        if less is None or seed in less
    }


def _numbers(claim: Claim, system: str, results: Sequence[Result], after: float) -> dict[int, float]:
    """The number that is claimed about, of each seed of a system that has it."""
    found = {}
    for r in results:
        if r.cell.setting == system and r.curve:
            upto = after * r.curve[-1].batches
            value = number(claim, [p for p in r.curve if p.batches <= upto])
            if value is not None:
                found[r.cell.seed] = value
    return found


def number(claim: Claim, curve: Sequence[Point]) -> float | None:
    if claim.reward is not None:
        curve = [replace(p, reward=p.rewards[claim.reward]) for p in curve]
    reward = [p.reward for p in curve]
    if claim.kl is not None:
        return reward_at(curve, claim.kl)
    if claim.to is not None:
        return labels_to_reach(curve, claim.to)
    if claim.of == "fall":
        return max(best - now for best, now in zip(accumulate(reward, max), reward, strict=True))
    return reward[-1] - (reward[0] if claim.of == "change" else 0.0)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: the k-th smallest of m times m - k + 1, never below a smaller one's."""
    order = np.argsort(p, kind="stable")
    scaled = [min(1.0, (len(p) - rank) * p[i]) for rank, i in enumerate(order)]
    out = [0.0] * len(p)
    for i, value in zip(order, accumulate(scaled, max), strict=True):
        out[i] = float(value)
    return out


def lines(found: Sequence[Verdict], declared: bool) -> list[str]:
    """As Markdown."""
    if all(each.p is None for each in found):
        return []
    head = "Claims" if declared else "Differences"
    about = (
        "Differences are paired by seed, positive where they are as claimed: mean ± half the 95 % t-interval; p is "
        f"two-sided, corrected by Holm for all {sum(each.p is not None for each in found)} rows. An answer is given where "
        f"it is below {LEVEL:g}.\n"
    )
    table = ["| claim | seeds | difference | p | p, Holm | |", "|---|---|---|---|---|---|"]
    table += [
        f"| {v.claim.says} | {v.seeds} | {_difference(v)} | {_p(v.p)} | {_p(v.holm)} | {v.answer} |" for v in found
    ]
    return [f"\n## {head}\n", about, *table, ""]


def _difference(v: Verdict) -> str:
    if np.isnan(v.mean):
        return "–"
    return f"{v.mean:+.3f}" + ("" if np.isnan(v.half) else f" ± {v.half:.3f}")


def _p(p: float | None) -> str:
    return "–" if p is None else "<0.0001" if p < 1e-4 else f"{p:.2g}"
