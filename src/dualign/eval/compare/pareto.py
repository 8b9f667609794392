"""Reward against KL: second-order fit and its peak (ICLR 2026, Fig. 4 and App. B.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Fit:
    """reward = a·KL² + b·KL + c by least squares, on [low, high] (no further: beyond the points a parabola says
    nothing), and where it is highest there."""

    a: float
    b: float
    c: float
    low: float
    high: float
    peak_kl: float
    peak_reward: float

    def at(self, kl: np.ndarray) -> np.ndarray:
        return self.a * kl**2 + self.b * kl + self.c


def fit(kl: Sequence[float], reward: Sequence[float]) -> Fit | None:
    """The fit of points (KL, reward); None with fewer than three different KLs, where a parabola is not determined."""
    x, y = np.asarray(kl, dtype=float), np.asarray(reward, dtype=float)
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(np.unique(x)) < 3:
        return None
    a, b, c = (float(v) for v in np.polyfit(x, y, 2))
    low, high = float(x.min()), float(x.max())
    ends = [low, high, *([-b / (2 * a)] if a < 0 and low < -b / (2 * a) < high else [])]
    peak = max(ends, key=lambda v: a * v**2 + b * v + c)
    return Fit(a, b, c, low, high, peak, a * peak**2 + b * peak + c)
