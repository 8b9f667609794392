"""Holm's correction, claims, and whether what --power says holds when it is tried."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dualign.eval.compare.claims import Claim, Verdict, holm, number
from dualign.eval.compare.power import POWER, detectable, power_of, seeds_needed, spread
from dualign.eval.compare.results import Point

TRIALS = 20_000


def test_holm():
    """By hand: .01 · 4, .02 · 3, .03 · 2, .05 · 1, none below one before it."""
    assert holm([0.03, 0.01, 0.05, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.9]) == [1.0, 1.0] and holm([]) == []


def tried(effect: float, variance: float, seeds: int, alpha: float, rng: np.random.Generator) -> float:
    """The share of experiments in which the paired t-test tells the effect."""
    found = rng.normal(effect, variance**0.5, (TRIALS, seeds))
    return float((stats.ttest_1samp(found, 0, axis=1).pvalue < alpha).mean())


@pytest.mark.parametrize(("effect", "variance", "comparisons"), [(0.1, 0.004, 1), (0.1, 0.02, 20), (0.3, 0.02, 5)])
def test_the_seeds_that_it_names_have_the_power_that_it_promises(effect, variance, comparisons):
    alpha, rng = 0.05 / comparisons, np.random.default_rng(0)
    seeds = seeds_needed(effect, variance, alpha)
    error = 3 * (POWER * (1 - POWER) / TRIALS) ** 0.5
    for count in (seeds - 1, seeds):
        assert tried(effect, variance, count, alpha, rng) == pytest.approx(
            power_of(effect, variance, count, alpha), abs=error
        )
    assert power_of(effect, variance, seeds, alpha) >= POWER > power_of(effect, variance, seeds - 1, alpha)
    assert power_of(detectable(variance, seeds, alpha), variance, seeds, alpha) == pytest.approx(POWER, abs=1e-6)


def test_the_power_holds_for_runs_drawn_like_those_it_was_told_from():
    """Seeds differ by 0.05 and prompts by 0.5: from pilots of eight seeds it says how many seeds of 400 prompts tell
    0.06; over many pilots the median is what the truth asks for."""
    rng, seeds_sd, prompt_sd, prompts = np.random.default_rng(1), 0.05, 0.5, 200
    needed = []
    for _ in range(60):
        shift_S1 = rng.normal(0, seeds_sd, (8, 1))
        s = spread(list(shift_S1 + rng.normal(0, prompt_sd, (8, prompts))))
        assert s.prompts == prompts and s.degrees == 7
        needed.append(seeds_needed(0.06, s.variance(400), 0.05))
    truth = seeds_needed(0.06, seeds_sd**2 + prompt_sd**2 / 400, 0.05)
    assert abs(np.median(needed) - truth) <= 2
    means = rng.normal(0.06, seeds_sd, (TRIALS, truth)) + rng.normal(0, prompt_sd / 400**0.5, (TRIALS, truth))
    share = float((stats.ttest_1samp(means, 0, axis=1).pvalue < 0.05).mean())
    assert share >= POWER - 3 * (POWER * (1 - POWER) / TRIALS) ** 0.5


def point(batches: int, reward: float, kl: float) -> Point:
    return Point(batches, 100 * batches, 0, reward, kl, kl, 5, 0, 1, rewards={"proxy": 10 * reward})


def test_what_a_claim_measures():
    curve = [point(0, 0.0, 0), point(1, 0.6, 1), point(2, 0.2, 3), point(3, 0.4, 4)]

    def of(**keys):
        return number(Claim(says="", more="a", **keys), curve)

    assert of() == 0.4 and of(of="change", reward="proxy") == 4
    assert of(of="fall") == pytest.approx(0.4)
    assert of(of="labels", to=0.3) == pytest.approx(50) and of(of="labels", to=0.7) is None
    assert of(of="at_kl", kl=0.5) == pytest.approx(0.3) and of(of="at_kl", kl=9) is None


def test_an_answer_needs_a_small_corrected_p():
    claim = Claim(says="", more="a")
    answers = [
        Verdict(claim, 9, mean, 0.1, 0.001, p).answer for mean, p in ((1, 0.04), (-1, 0.04), (1, 0.06), (1, None))
    ]
    assert answers == ["yes", "no: the opposite", "cannot tell", "cannot tell"]
