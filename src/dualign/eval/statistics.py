"""Intervals. The unit of sampling is the prompt: all that happened on one prompt is one draw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from dualign.common.intervals import FEW, all_equal, bracket, half_width

Array = NDArray[np.float64]
RESAMPLES = 2000
LEVEL = 0.95
OTHERS = 5  # scores unlike the commonest, below which a bootstrap of a win rate is too sure


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, infinite where there is none; `n`: prompts, or seeds, that it rests on. nan where
    there is no value."""

    value: float
    low: float
    high: float
    n: int

    def record(self) -> dict[str, Any]:
        return asdict(self)

    def text(self, form: str = "{:+.2f}") -> str:
        return bracket(self.record(), form)


NOTHING = Estimate(float("nan"), float("nan"), float("nan"), 0)


def t_interval(values: ArrayLike) -> Estimate:
    """Mean of independent values with Student's interval. A single value has an infinite one, and so have equal values:
    they do not tell how much others would differ."""
    x = np.asarray(values, float)
    if not len(x):
        return NOTHING
    mean, half = float(x.mean()), half_width(x)
    if np.isnan(half):
        return Estimate(mean, float("-inf"), float("inf"), len(x))
    return Estimate(mean, mean - half, mean + half, len(x))


@lru_cache(maxsize=4)
def counts(n: int, resamples: int, seed: int) -> Array:
    """(B, n): how often each of n prompts is drawn in each of B bootstrap samples. Do not write to it."""
    return np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=resamples).astype(float)


def bootstrap(
    values: ArrayLike,
    statistic: Callable[[Array, Array], Array] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Paired bootstrap over prompts.

    `values`: (n,) or (n, d), one row per prompt with everything measured on it, so that what is compared stays
    paired. `statistic(values, weight_Bn)` gives (B,): the statistic under each row of prompt counts; default: the mean.
    """
    x = np.asarray(values, float)
    if not len(x):
        return NOTHING
    statistic = statistic or weighted_mean
    value = float(statistic(x, np.ones((1, len(x))))[0])
    return percentile(value, statistic(x, counts(len(x), resamples, seed)), len(x))


def percentile(value: float, draws: Array, n: int) -> Estimate:
    """Efron's percentile interval at Hesterberg's expanded level Φ(−t √(n/(n−1))) (2015, The American Statistician
    69(4), section 5.3): the plain one is as much too narrow in small samples as a normal interval is. Infinite for a
    single prompt, and where all draws are equal."""
    if n < 2 or all_equal(draws):
        return Estimate(value, float("-inf"), float("inf"), n)
    tail = float(stats.norm.cdf(stats.t.ppf((1 - LEVEL) / 2, n - 1) * np.sqrt(n / (n - 1))))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Estimate(value, float(low), float(high), n)


def weighted_mean(values: Array, weight_Bn: Array) -> Array:
    mean: Array = weight_Bn @ values / weight_Bn.sum(1)
    return mean


def share(score_n: ArrayLike, seed: int = 0) -> Estimate:
    """A win rate: the mean of per-prompt scores in [0, 1] (1 won, 0.5 tie, 0 lost, or means of several pairs).

    Bootstrap from FEW prompts on. Of fewer, and where all scores are equal, Wilson's interval (1927), as if every score
    were won or lost, which is never narrower: a bootstrap would say that of six wins nothing is uncertain. Where fewer
    than OTHERS scores are not the commonest one, a bootstrap is too sure as well: on each side the wider of the two.
    """
    from dualign.annotate.agreement import wilson

    x = np.asarray(score_n, float)
    if not len(x):
        return NOTHING
    if len(x) < FEW or all_equal(x):
        return Estimate(float(x.mean()), *wilson(float(x.sum()), len(x)), len(x))
    found = bootstrap(x, seed=seed)
    if len(x) - np.unique(x, return_counts=True)[1].max() >= OTHERS:
        return found
    low, high = wilson(float(x.sum()), len(x))
    return replace(found, low=min(low, found.low), high=max(high, found.high))


def over_seeds(score_Sn: list[dict[str, float]]) -> tuple[Estimate, Estimate]:
    """Several seeds, each a score per prompt id: the mean over seeds with Student's interval between seeds (how much a
    new seed may differ; no win rate lies outside 0 and 1), and with the bootstrap over prompts, each prompt's scores
    averaged over the seeds that have it (how much new prompts may)."""
    between = t_interval([float(np.mean(list(s.values()))) for s in score_Sn if s])
    if np.isfinite(between.low):
        between = replace(between, low=max(0.0, between.low), high=min(1.0, between.high))
    prompts = sorted({p for s in score_Sn for p in s})
    return between, share([np.mean([s[p] for s in score_Sn if p in s]) for p in prompts])


def correlation(x: ArrayLike, y: ArrayLike) -> dict[str, float]:
    """Pearson's r with Fisher's 95 % interval and Spearman's ρ; nan where a side does not vary or n < 4."""
    a, b = np.asarray(x, float), np.asarray(y, float)
    if len(a) < 4 or a.std() == 0 or b.std() == 0:
        return dict.fromkeys(("pearson", "low", "high", "spearman"), float("nan")) | {"n": len(a)}
    r = float(np.corrcoef(a, b)[0, 1])
    half = stats.norm.ppf((1 + LEVEL) / 2) / np.sqrt(len(a) - 3)
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    return {"pearson": r, "low": float(np.tanh(z - half)), "high": float(np.tanh(z + half)),
            "spearman": float(stats.spearmanr(a, b).statistic), "n": len(a)}  # fmt: skip
