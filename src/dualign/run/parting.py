"""When the witness and the training reward part: a sequential test with a stated rate of false alarms.

**The claim** of a look: the policy's mean training reward is above π_0's, and its mean by the witness is below π_0's.
**H0** of a look is that this is not so: the reward has not risen, or the witness has not fallen.

A look tests both halves at one level and speaks if both hold, so under H0 it speaks falsely with at most that level's
probability (an intersection-union test: Berger 1982, Technometrics 24, 295-300). The levels of a run's looks sum to at
most α (Bonferroni), so over the whole run a look whose H0 holds speaks with probability at most α, however the looks
depend on one another. The halves are one-sided t-tests, by Welch or of pairs. They are exact where means of prompts are
normal; benchmarks/witness.py has the rates where they are not.

The unit is the prompt: completions of one prompt are averaged. Arrays hold a number per prompt on the last axis, nan
where there is no label; the axes before it are independent.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

Array = NDArray[np.float64]

LEAST = 8  # prompts that a mean must rest on for a look to speak


def level(alpha: float, spent: float, to_come: int) -> float:
    """This look's share of what is left of α, where `to_come` looks are planned, this one among them. One share stays
    back, for a run that is prolonged."""
    return (alpha - spent) / (to_come + 1)


def parted(witness: Array, witness_0: Array, reward: Array, reward_0: Array) -> Array:
    """The p-value of a look at other prompts than π_0's: the larger of those of the two halves."""
    return np.maximum(below(witness, witness_0), below(-reward, -reward_0))


def parted_pairs(witness: Array, witness_0: Array, reward: Array, reward_0: Array) -> Array:
    """The same where entry i is one prompt, now and at π_0."""
    return np.maximum(below_zero(witness - witness_0), below_zero(reward_0 - reward))


def below(now: Array, then: Array) -> Array:
    """Welch's one-sided p-value that `now` has the lower mean; 1 where there are too few values or none differ."""
    (m, v, n), (m0, v0, n0) = _moments(now), _moments(then)
    with np.errstate(divide="ignore", invalid="ignore"):
        a, a0 = v / n, v0 / n0
        freedom = (a + a0) ** 2 / (a**2 / (n - 1) + a0**2 / (n0 - 1))
        return _p((m - m0) / np.sqrt(a + a0), freedom, np.minimum(n, n0))


def below_zero(difference: Array) -> Array:
    """The one-sided p-value that the mean is below 0; 1 likewise."""
    m, v, n = _moments(difference)
    with np.errstate(divide="ignore", invalid="ignore"):
        return _p(m / np.sqrt(v / n), n - 1, n)


def _moments(values: Array) -> tuple[Array, Array, Array]:
    """Mean, variance and count of what is not nan. Values that differ by rounding alone have no variance."""
    known = ~np.isnan(values)
    n = known.sum(-1).astype(float)
    x = np.where(known, values, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = x.sum(-1) / n
        variance = (np.where(known, x - mean[..., None], 0.0) ** 2).sum(-1) / (n - 1)
    rounding = 1e-9 * np.abs(x).max(-1, initial=0.0)
    return mean, np.where(variance <= rounding**2, 0.0, variance), n


def _p(t: Array, freedom: Array, prompts: Array) -> Array:
    p = stdtr(freedom, t)
    return np.where((prompts < LEAST) | np.isnan(p), 1.0, p)
