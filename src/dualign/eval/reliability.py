"""Krippendorff's α: agreement beyond chance of any number of observers, of whom some may be silent."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np

from dualign.eval.statistics import NOTHING, RESAMPLES, Array, Estimate, counts, percentile

Level = Literal["nominal", "interval"]


def krippendorff(units: Sequence[Sequence[Hashable]], level: Level = "nominal", seed: int = 0) -> Estimate:
    """α = 1 − D_o/D_e over units (pairs, answers), each the values that its observers gave it, with the 95 % percentile
    interval of a bootstrap over units. A unit with fewer than two values says nothing. Krippendorff (2011), "Computing
    Krippendorff's Alpha-Reliability", sections C and D. nan where all values are one."""
    found = {value for unit in units for value in unit}
    values = sorted(found) if level == "interval" else sorted(found, key=repr)  # type: ignore[type-var]
    at = {value: i for i, value in enumerate(values)}
    each = [coincidences([at[value] for value in unit], len(values)) for unit in units if len(unit) > 1]
    return alpha(np.array(each), _distance(values, level), seed)


def alpha(each_ncc: Array, distance_cc: Array, seed: int = 0) -> Estimate:
    """Of the coincidences of n units over c values, and how far two values differ."""
    if not len(each_ncc):
        return NOTHING
    flat, n = each_ncc.reshape(len(each_ncc), -1), len(each_ncc)

    def statistic(weight_Bn: Array) -> Array:
        o_Bcc = (weight_Bn @ flat).reshape(len(weight_Bn), *distance_cc.shape)
        n_Bc = o_Bcc.sum(2)
        n_B = n_Bc.sum(1)
        observed = (o_Bcc * distance_cc).sum((1, 2)) / n_B
        chance = np.einsum("bc,bk,ck->b", n_Bc, n_Bc, distance_cc) / (n_B * (n_B - 1))
        with np.errstate(invalid="ignore", divide="ignore"):
            found: Array = np.where(chance > 0, 1 - observed / chance, np.nan)
        return found

    value, draws = float(statistic(np.ones((1, n)))[0]), statistic(counts(n, RESAMPLES, seed))
    return NOTHING if np.isnan(value) else percentile(value, draws[~np.isnan(draws)], n)


def coincidences(unit: Sequence[int], values: int) -> Array:
    """(c, c): how often two of a unit's values meet, each of its m observers weighing as one: over m − 1."""
    count = np.bincount(unit, minlength=values).astype(float)
    return (np.outer(count, count) - np.diag(count)) / (len(unit) - 1)


def _distance(values: Sequence[object], level: Level) -> Array:
    if level == "nominal":
        return 1 - np.eye(len(values))
    x = np.asarray(values, float)
    squares: Array = (x[:, None] - x[None, :]) ** 2
    return squares
