"""Who meets whom, and what verdicts are worth, held to independent derivations."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize

from dualign.annotate.designs import all_pairs, bradley_terry, default_rounds, next_round, tournament_pairs, win_shares


def reference_strengths(wins: np.ndarray) -> np.ndarray:
    """By a general optimiser, on the log-likelihood as it is written down."""

    def cost(s: np.ndarray) -> float:
        fit = sum(wins[i, j] * np.log1p(np.exp(s[j] - s[i])) for i in range(len(s)) for j in range(len(s)))
        prior = sum(0.5 * np.log1p(np.exp(-x)) + 0.5 * np.log1p(np.exp(x)) for x in s)
        return float(fit + prior)

    s = minimize(cost, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-8}).x
    there = (wins + wins.T).sum(1) > 0
    return np.where(there, s - s[there].mean(), np.nan)


@pytest.mark.parametrize("seed", range(8))
def test_strengths_are_the_regularised_maximum_likelihood(seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(2, 7))
    wins = rng.integers(0, 5, (k, k)) / 2.0 * (rng.random((k, k)) < 0.6)
    np.fill_diagonal(wins, 0)
    wins[-1, :] = wins[:, -1] = 0  # one that nobody met
    if wins.any():
        assert np.allclose(bradley_terry(wins), reference_strengths(wins), atol=1e-4, equal_nan=True)


def test_two_that_met_once_by_hand() -> None:
    """s and -s with 1 - σ(2s) = σ(s) - ½: by symmetry the common opponent is at 0."""
    s = bradley_terry(np.array([[0.0, 1.0], [0.0, 0.0]]))
    assert s[0] == -s[1] > 0
    assert 1 - 1 / (1 + np.exp(-2 * s[0])) == pytest.approx(1 / (1 + np.exp(-s[0])) - 0.5, abs=1e-7)


def test_who_won_everything_stays_finite_and_equals_are_equal() -> None:
    chain = np.triu(np.full((16, 16), 1000.0), 1)
    s = bradley_terry(chain)
    assert np.isfinite(s).all() and (np.diff(s) < 0).all() and abs(s.sum()) < 1e-6
    ties = np.full((5, 5), 0.5) - 0.5 * np.eye(5)
    assert bradley_terry(ties).tolist() == [0.0] * 5
    cycle = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0.0]])
    assert bradley_terry(cycle).tolist() == [0.0] * 3 and win_shares(cycle).tolist() == [0.5] * 3


def test_groups_that_never_met_are_placed_by_the_common_opponent() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 1.0
    s = bradley_terry(wins)
    assert s[0] == s[2] > s[1] == s[3]


def test_many_prompts_at_once_are_each_by_itself() -> None:
    wins = np.random.default_rng(0).random((5, 4, 4)) * (1 - np.eye(4))
    assert np.allclose(bradley_terry(wins), [bradley_terry(one) for one in wins], atol=1e-7)


def test_shares_leave_out_what_was_not_answered() -> None:
    wins = np.array([[0, 1, 0.5, 0], [0, 0, 0, 0], [0.5, 0, 0, 0], [0, 0, 0, 0]])
    assert np.array_equal(win_shares(wins), [0.75, 0, 0.5, np.nan], equal_nan=True)


@pytest.mark.parametrize("k", [2, 3, 4, 5, 8, 16])
def test_a_tournament_repeats_no_pair_and_leaves_nobody_out(k: int) -> None:
    rng, met = np.random.default_rng(k), np.zeros((k, k), bool)
    quality, wins, pairs = rng.standard_normal(k), np.zeros((k, k)), []
    for _ in range(default_rounds(k)):
        these = next_round(met, bradley_terry(wins) if wins.any() else np.zeros(k), rng)
        assert len({i for pair in these for i in pair}) == 2 * len(these)  # each at most once a round
        for i, j in these:
            assert not met[i, j]
            met[i, j] = met[j, i] = True
            wins[(i, j) if quality[i] > quality[j] else (j, i)] = 1
        pairs += these
    assert met.any(1).all() and len(pairs) <= tournament_pairs(k, default_rounds(k)) <= len(all_pairs(k))
    assert not next_round(~np.eye(k, dtype=bool), np.zeros(k), rng)  # all have met


def test_winners_meet_winners() -> None:
    met = np.zeros((4, 4), bool)
    met[0, 1] = met[1, 0] = met[2, 3] = met[3, 2] = True
    assert next_round(met, np.array([1.0, 0, 0, 1]), np.random.default_rng(0)) == [(0, 3), (1, 2)]


def test_no_rounds_without_opponents() -> None:
    assert [default_rounds(k) for k in (1, 2, 3, 4, 5, 8, 16)] == [0, 1, 2, 2, 3, 3, 4]
    assert [tournament_pairs(k, 9) for k in (1, 2, 3, 4)] == [0, 1, 3, 6]
