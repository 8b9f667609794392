"""How many seeds and prompts it takes to tell a difference of a given size, by the runs that are there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from dualign.common.errors import UserError
from dualign.eval.compare.claims import LEVEL, Claim, claims_of, differences
from dualign.eval.compare.grid import Grid
from dualign.eval.compare.results import Result
from dualign.run.folder import Run
from dualign.training.heldout import by_prompt, part_of_label

POWER = 0.8
MOST = 10_000  # seeds that are looked at
MIDDLES = (np.arange(1000) + 0.5) / 1000  # of equal shares of a distribution
TIMES = (0.5, 1, 2, 4, 16)  # as many prompts as the runs have


@dataclass(frozen=True)
class Spread:
    """Of a difference between two runs of one seed: the variance that seeds make, and that of one prompt's difference
    within a seed, whose share of the mean's variance falls with the number of prompts."""

    seeds: float
    prompt: float
    prompts: int
    degrees: int  # of freedom that it rests on

    def variance(self, prompts: float) -> float:
        return self.seeds + self.prompt / prompts


def spread(differences_SP: Sequence[np.ndarray]) -> Spread:
    """Of each seed's differences by prompt: between seeds, and within (one-way random effects; a component that comes out
    negative is 0)."""
    means = np.array([each.mean() for each in differences_SP])
    within = float(np.mean([each.var(ddof=1) for each in differences_SP]))
    prompts = int(np.mean([len(each) for each in differences_SP]))
    return Spread(max(0.0, float(means.var(ddof=1)) - within / prompts), within, prompts, len(means) - 1)


def power_of(effect: float, variance: float, seeds: int, alpha: float) -> float:
    """Of the two-sided paired t-test: the noncentral t distribution's tails, as a mean over the standard deviation that
    so many seeds show (scipy's nct gives NaN far out)."""
    if variance <= 0:
        return 1.0
    degrees, shift = seeds - 1, effect * (seeds / variance) ** 0.5
    bound_D = stats.t.ppf(1 - alpha / 2, degrees) * np.sqrt(stats.chi2.ppf(MIDDLES, degrees) / degrees)
    return float((stats.norm.sf(bound_D - shift) + stats.norm.cdf(-bound_D - shift)).mean())


def seeds_needed(effect: float, variance: float, alpha: float, power: float = POWER) -> int | None:
    """The fewest seeds with that power; None where it takes more than MOST."""
    low, high = 1, 2
    while power_of(effect, variance, high, alpha) < power:
        low, high = high, 2 * high
        if low > MOST:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(effect, variance, middle, alpha) >= power else (middle, high)
    return high


def detectable(variance: float, seeds: int, alpha: float, power: float = POWER) -> float:
    """The smallest difference that so many seeds tell with that power."""
    low, high = 0.0, 1.0
    while power_of(high, variance, seeds, alpha) < power:
        high *= 2
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(middle, variance, seeds, alpha) >= power else (middle, high)
    return high


def power_lines(grid: Grid, results: Sequence[Result], effect: float) -> list[str]:
    """What a difference of `effect` takes, for each claim on rewards at the end, and with Holm's correction at its first
    step, which every claim may have to take: α over the number of claims. Raises UserError where no two systems share two
    seeds."""
    claims = claims_of(grid)
    alpha, found = LEVEL / len(claims), {}
    for claim in claims:
        if len(differences_SP := paired(claim, results)) > 1:
            found[claim.says] = (spread(differences_SP), len(differences_SP))
    if not found:
        raise UserError(f"{grid.out}: no claim has two seeds whose runs are finished, so there is nothing to go by")
    lines = [
        f"To tell a difference of {effect:g} with power {POWER:g} at α = {LEVEL:g}, corrected by Holm for {len(claims)} "
        f"comparisons (α = {alpha:.2g} at the first step); paired by seed",
    ]
    for says, (s, seeds) in found.items():
        lines.append(
            f"  {says}: sd over seeds {s.seeds**0.5:.3g}, over prompts within a seed {s.prompt**0.5:.3g} "
            f"(from {seeds} seeds × {s.prompts} prompts)"
        )
        lines.append(f"    the runs there are tell {detectable(s.variance(s.prompts), seeds, alpha):.3g}")
        for times in TIMES:
            prompts = max(1, round(times * s.prompts))
            needed = seeds_needed(effect, s.variance(prompts), alpha)
            lines.append(f"    {prompts} prompts: {f'more than {MOST}' if needed is None else needed} seeds")
    return lines


def paired(claim: Claim, results: Sequence[Result]) -> list[np.ndarray]:
    """Of each seed that both systems have, the difference of the final reward by prompt. Empty for a claim that is about
    something else than two systems' rewards at the end."""
    if claim.of != "end" or claim.than is None or claim.after != 1:
        return []
    runs = {(r.cell.setting, r.cell.seed): r for r in results if r.curve}
    found = []
    for seed in differences(claim, results):
        more, less = (_rewards(runs[name, seed], claim) for name in (claim.more, claim.than))
        shared = sorted(set(more) & set(less))
        if len(shared) > 1:
            found.append(np.array([more[key] - less[key] for key in shared]))
    return found


def _rewards(r: Result, claim: Claim) -> dict[str, float]:
    rows, _ = Run.open(r.cell.folder).read_evaluation(r.curve[-1].batches)
    name = claim.reward or r.measure
    value = part_of_label(name) if name else (lambda row: row.label.value)
    return {key: float(np.mean(values)) for key, values in by_prompt(rows, value).items()}
