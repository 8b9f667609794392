"""Which of K completions meet, and what their verdicts are worth. Arithmetic alone: nothing is asked here.

A matrix of wins holds how often i was better than j: `wins[i, j]`, a tie half for each. What was not answered is in
neither place. Leading dimensions are other prompts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np

Pair = tuple[int, int]
Floats = np.ndarray
TOLERANCE = 1e-10  # of a Bradley-Terry strength
DIGITS = 8  # to which strengths are rounded, so that equal ones are equal
NEWTON_STEPS = 100


def all_pairs(k: int) -> list[Pair]:
    return list(combinations(range(k), 2))


def default_rounds(k: int) -> int:
    """⌈log2 K⌉, as many as a knockout would need; 0 for one completion."""
    return math.ceil(math.log2(k)) if k > 1 else 0


def tournament_pairs(k: int, rounds: int) -> int:
    """The most pairs that a tournament of so many rounds asks for."""
    return min(rounds * (k // 2), k * (k - 1) // 2)


def next_round(met: np.ndarray, strength: Floats, rng: np.random.Generator) -> list[Pair]:
    """One round of a Swiss tournament: completions of like strength meet, each at most once, none that have `met`
    before. Who sat out most comes first; chance decides between equals. met: (K, K) bool, strength: (K,)."""
    i, j = np.nonzero(np.triu(~met, 1))
    games, gap = met.sum(1), np.round(np.abs(strength[i] - strength[j]), DIGITS)
    order = np.lexsort((rng.random(len(i)), gap, games[i] + games[j]))  # the last key comes first
    busy: set[int] = set()
    pairs: list[Pair] = []
    for a, b in zip(i[order].tolist(), j[order].tolist(), strict=True):
        if a not in busy and b not in busy:
            busy |= {a, b}
            pairs.append((a, b))
    return sorted(pairs)


def win_shares(wins: Floats) -> Floats:
    """Share of its comparisons that each won, a tie half; NaN without any. (..., K, K) -> (..., K)"""
    won, lost = wins.sum(-1), wins.sum(-2)
    with np.errstate(invalid="ignore"):
        return won / (won + lost)


def bradley_terry(wins: Floats) -> Floats:
    """Strengths s with P(i beats j) = σ(s_i - s_j), of mean zero over those compared; NaN without any comparison.
    (..., K, K) -> (..., K)

    Each completion also has one tie against an opponent of strength 0 that all have in common. With this prior the
    maximum exists and is unique: who won everything stays finite, and groups that never met each other are placed by
    that opponent. The log-likelihood is concave; Newton's steps are kept within 1, where its curvature hardly changes.
    """
    games = wins + np.swapaxes(wins, -1, -2)
    s = np.zeros(wins.shape[:-1])
    for _ in range(NEWTON_STEPS):
        p = 1 / (1 + np.exp(s[..., None, :] - s[..., :, None]))  # P(i beats j)
        prior = 1 / (1 + np.exp(-s))
        slope = (wins - games * p).sum(-1) + 0.5 - prior
        bend = games * p * (1 - p)  # minus the second derivative, between two completions
        own = (bend.sum(-1) + prior * (1 - prior))[..., None] * np.eye(wins.shape[-1])
        step = np.linalg.solve(own - bend, slope[..., None])[..., 0]
        s = s + step / np.maximum(1, np.abs(step).max(-1, keepdims=True, initial=0))
        if np.abs(step).max(initial=0) < TOLERANCE:
            break
    compared = games.sum(-1) > 0
    mean = np.where(compared, s, 0).sum(-1, keepdims=True) / np.maximum(compared.sum(-1, keepdims=True), 1)
    return np.where(compared, np.round(s - mean, DIGITS) + 0.0, np.nan)


SCORES: dict[str, Callable[[Floats], Floats]] = {"wins": win_shares, "bradley_terry": bradley_terry}
