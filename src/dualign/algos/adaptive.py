"""β and α that DAR finds for itself: a trust region on the batch's weights, and a budget on the KL to π_0."""

from __future__ import annotations

import math

from torch import Tensor

BETA_RANGE = 1e-3, 1e3  # of a temperature of advantages that have variance 1
PROPORTIONAL = 0.5  # how far a relative error of the KL moves log α at once


def weights_kl(advantage_N: Tensor, beta: float) -> float:
    """KL(q‖u) in nats, q ∝ exp(A/β) over the rows, u uniform: falls monotonically in β from log(N / rows that share the
    highest A) to 0."""
    log_q_N = (advantage_N.double() / beta).log_softmax(0)
    return float((log_q_N.exp() * (log_q_N + math.log(len(log_q_N)))).sum())


def trust_region(advantage_N: Tensor, epsilon: float) -> float | None:
    """The β whose weights exp(A/β) are `epsilon` nats from uniform: the minimiser of the dual β·ε + β·log mean exp(A/β)
    (REPS, Peters et al. 2010; MPO, Abdolmaleki et al. 2018), within BETA_RANGE. An end of it where no β within reaches
    `epsilon`; None where every β gives the same weights, as all A are equal."""
    from scipy.optimize import brentq

    if len(advantage_N) == 0 or bool((advantage_N == advantage_N[0]).all()):
        return None

    def excess(log_beta: float) -> float:
        return weights_kl(advantage_N, math.exp(log_beta)) - epsilon

    low, high = (math.log(beta) for beta in BETA_RANGE)
    if excess(low) <= 0:
        return BETA_RANGE[0]
    if excess(high) >= 0:
        return BETA_RANGE[1]
    return math.exp(brentq(excess, low, high, xtol=1e-14, rtol=1e-14))


def next_alpha(level: float, kl: float, budget: float, rate: float, lowest: float) -> tuple[float, float]:
    """(α's new level, α) after a KL of `kl` nats was measured: a proportional-integral controller in log α.

    With the relative error e, at most 1 either way, the level is multiplied by exp(rate · e), so that it stands still
    only where the KL is the budget; α is the level times exp(PROPORTIONAL · e), which damps the way there: the KL follows
    α only after many updates. Both stay within [lowest, 1].
    """
    error = max(-1.0, min(1.0, kl / budget - 1))

    def moved(value: float, by: float) -> float:
        return max(lowest, min(1.0, value * math.exp(by)))

    level = moved(level, rate * error)
    return level, moved(level, PROPORTIONAL * error)
