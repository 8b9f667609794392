"""The second-order fit and the count of labels, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from dualign.eval.compare.pareto import fit
from dualign.eval.compare.results import Mean, Point, chance, labels_to_reach, reward_at


def test_a_parabola_is_found_again_with_its_peak():
    x = np.array([1.0, 2, 4, 7])
    found = fit(x, 3 - 0.5 * (x - 3) ** 2)
    assert (found.a, found.b, found.c) == pytest.approx((-0.5, 3.0, -1.5))
    assert (found.peak_kl, found.peak_reward) == pytest.approx((3.0, 3.0))


def test_the_peak_stays_within_the_points():
    rising = fit([0, 1, 2], [0, 3, 4])  # its vertex lies at 2
    assert rising.peak_kl == 2 and rising.peak_reward == pytest.approx(4)
    convex = fit([0, 1, 2], [4, 1, 0.5])
    assert convex.a > 0 and convex.peak_kl == 0 and convex.peak_reward == pytest.approx(4)
    beyond = fit([0, 1, 2], [0, 2.5, 4.5])  # vertex at 5.5, where no run has been
    assert beyond.peak_kl == 2 and beyond.peak_reward == pytest.approx(4.5)


def test_too_few_points_give_no_fit():
    assert fit([1, 2], [1, 2]) is None
    assert fit([1, 2, 2, 1], [1, 2, 3, 4]) is None
    assert fit([1, 2, float("nan")], [1, 2, 3]) is None


def point(labels, reward):
    return Point(labels // 10, labels, 0.0, reward, 0.0, 0.0, 0.0, 0.0, 1.0)


def test_labels_are_counted_to_the_first_crossing():
    curve = [point(0, 0.0), point(100, 1.0), point(200, 0.5), point(300, 2.0)]
    assert labels_to_reach(curve, 0.25) == 25
    assert labels_to_reach(curve, 1.4) == pytest.approx(260)
    assert labels_to_reach(curve, 2.0) == 300
    assert labels_to_reach(curve, 2.1) is None
    assert labels_to_reach(curve, -1) == 0


def test_reward_at_a_kl_is_that_of_the_first_crossing():
    curve = [
        replace(point(i, reward), kl=kl) for i, (kl, reward) in enumerate([(0, 0.0), (4, 1.0), (3, 0.5), (8, 3.0)])
    ]
    assert reward_at(curve, 1.0) == 0.25 and reward_at(curve, 4.0) == 1.0
    assert reward_at(curve, 5.5) == 1.75  # between 3 and 8
    assert reward_at(curve, 8.1) is None and reward_at(curve[:1], 0.0) is None


def test_settings_that_differ_no_more_than_seeds_are_chance():
    # by hand: between 1.5 on 1 degree of freedom, within 4 on 4: F = 1.5; of two settings that is t = 1.22, p = 0.288
    assert chance([[1.0, 2.0, 3.0], [2.0, 3.0, 4.0]]) == pytest.approx(0.2879, abs=1e-4)
    assert chance([[1.0, 1.1, 0.9], [2.0, 2.1, 1.9], [3.0, 3.1, 2.9]]) < 1e-5
    assert chance([[1.0], [2.0]]) is None and chance([[1.0, 2.0]]) is None
    assert chance([[1.0, 1.0], [1.0, 1.0]]) is None  # nothing varies: nothing to say


def test_intervals_of_a_mean():
    mean = Mean.of([1.0, 3.0, None, float("nan")])
    assert (mean.value, mean.n) == (2.0, 2)
    assert mean.half == pytest.approx(12.706204736 * np.sqrt(2) / np.sqrt(2))
    assert np.isnan(Mean.of([1.0]).half) and Mean.of([None]) is None
