"""Length and winning: win rate by length bucket, and the win rate there would be if both answers were equally long."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from dualign.common.intervals import FEW
from dualign.eval.statistics import NOTHING, RESAMPLES, Array, Estimate, counts, percentile, share

RIDGE = (
    0.01  # on both coefficients, per fit (not per row): keeps a separable sample finite, moves others by ~0.1 points
)
NEWTON = 25  # steps; with the ridge the problem is strictly convex and a dozen are enough


@dataclass(frozen=True)
class LengthControlled:
    """`win_rate`: at equal length. `slope`: log-odds of winning per tanh of one standard deviation more characters."""

    win_rate: Estimate
    slope: Estimate


def length_controlled(
    score_n: ArrayLike, chars_a_n: ArrayLike, chars_b_n: ArrayLike, seed: int = 0
) -> LengthControlled:
    """AlpacaEval 2.0's length-controlled win rate (Dubois et al. 2024, arXiv 2404.04475, Eq. 2) of a over b:

        logit p(a wins) = θ + φ · tanh(Δ / sd(Δ)),   Δ = characters of a − characters of b,

    fitted by maximum likelihood on the scores as soft labels; its value at Δ = 0 is σ(θ). The paper's third term, the
    instruction's difficulty, is estimated from a leaderboard of many models and does not exist for one pair of them.
    The interval is a bootstrap over prompts that fits anew in every resample; equal outcomes get what `share` gives.
    Of fewer than FEW prompts there is no value: two coefficients would fit nearly anything.
    """
    score, delta = np.asarray(score_n, float), np.asarray(chars_a_n, float) - np.asarray(chars_b_n, float)
    n = len(score)
    if n < FEW:
        nothing = replace(NOTHING, n=n)
        return LengthControlled(nothing, nothing)
    if score.min() == score.max():  # nothing to tell length's part by
        return LengthControlled(share(score, seed), NOTHING)
    (theta, phi), draws_B2 = _fit(score, delta, np.ones((1, n)))[0], _fit(score, delta, counts(n, RESAMPLES, seed))
    return LengthControlled(
        percentile(float(_sigmoid(theta)), _sigmoid(draws_B2[:, 0]), n), percentile(float(phi), draws_B2[:, 1], n)
    )


def _fit(score_n: Array, delta_n: Array, weight_Bn: Array) -> Array:
    """(B, 2) coefficients (θ, φ) under each row of weights: Newton's method on all B fits at once."""
    total_B = weight_Bn.sum(1, keepdims=True)
    mean = weight_Bn @ delta_n[:, None] / total_B
    sd = np.sqrt(np.maximum(weight_Bn @ (delta_n**2)[:, None] / total_B - mean**2, 1e-12))
    x_Bn = np.tanh(delta_n / np.maximum(sd, 1e-6))
    theta = np.zeros((len(weight_Bn), 2))
    for _ in range(NEWTON):
        p = _sigmoid(theta[:, :1] + theta[:, 1:] * x_Bn)
        residual, curve = weight_Bn * (score_n - p), weight_Bn * p * (1 - p)
        gradient = np.stack([residual.sum(1), (residual * x_Bn).sum(1)], 1) - RIDGE * theta
        a, b, c = curve.sum(1) + RIDGE, (curve * x_Bn).sum(1), (curve * x_Bn**2).sum(1) + RIDGE
        step = np.stack([c * gradient[:, 0] - b * gradient[:, 1], a * gradient[:, 1] - b * gradient[:, 0]], 1)
        step /= (a * c - b * b)[:, None]
        theta += np.clip(step, -4, 4)
        if np.abs(step).max() < 1e-9:
            break
    return theta


def _sigmoid(x: Array) -> Array:
    p: Array = 0.5 * (1 + np.tanh(x / 2))  # no overflow
    return p


def by_length(score_n: ArrayLike, chars_a_n: ArrayLike, chars_b_n: ArrayLike, buckets: int = 4) -> list[dict[str, Any]]:
    """The win rate of a in `buckets` equally filled groups of prompts, by how much longer a's answer is than b's."""
    score, delta = np.asarray(score_n, float), np.asarray(chars_a_n, float) - np.asarray(chars_b_n, float)
    table = []
    for rows in np.array_split(np.argsort(delta, kind="stable"), min(buckets, len(delta)) or 1):
        if len(rows):
            least, most = int(delta[rows].min()), int(delta[rows].max())
            table.append({"longer_from": least, "longer_to": most, **share(score[rows]).record()})
    return table
