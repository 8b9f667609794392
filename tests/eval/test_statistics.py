"""Intervals hold what they promise, by simulation and against scipy."""

import numpy as np
import pytest
from scipy import stats

from dualign.common.intervals import FEW
from dualign.eval.length import by_length, length_controlled
from dualign.eval.statistics import bootstrap, correlation, over_seeds, share, t_interval

EXPERIMENTS = 1000


def coverage(draw, interval, truth):
    """Share of synthetic experiments whose 95 % interval holds the truth."""
    rng = np.random.default_rng(7)
    estimates = [interval(draw(rng)) for _ in range(EXPERIMENTS)]
    return np.mean([e.low <= truth <= e.high for e in estimates])


@pytest.mark.parametrize("n", [100, 400])
@pytest.mark.parametrize("p", [(0.3, 0.2, 0.5), (0.05, 0.2, 0.75)])
def test_win_rate_intervals_cover_95_percent(n, p):
    found = coverage(lambda rng: rng.choice([0, 0.5, 1], n, p=p), lambda x: share(x), np.dot(p, [0, 0.5, 1]))
    assert found == pytest.approx(0.95, abs=0.02)


def test_reward_intervals_cover_95_percent():
    assert coverage(lambda rng: rng.exponential(size=200), t_interval, 1.0) == pytest.approx(0.95, abs=0.02)


def test_paired_difference_covers_and_is_narrower_than_unpaired():
    def draw(rng):
        prompt = rng.normal(size=150) * 3  # what both models share
        return prompt + rng.normal(size=150) + 0.4, prompt + rng.normal(size=150)

    found = coverage(draw, lambda ab: bootstrap(ab[0] - ab[1], resamples=600), 0.4)
    assert found == pytest.approx(0.95, abs=0.02)
    a, b = draw(np.random.default_rng(0))
    paired = bootstrap(a - b)
    assert paired.high - paired.low < 0.5 * (
        stats.t.interval(0.95, 149, 0, stats.sem(a))[1] + stats.t.interval(0.95, 149, 0, stats.sem(b))[1]
    )


def lengths_and_scores(rng, n=300, theta=0.5, phi=1.2, shift=0.7):
    """Model a is better by θ at equal length, and longer on average, which the judge likes by φ."""
    chars_b = rng.integers(200, 1200, n)
    chars_a = np.maximum(1, chars_b + rng.normal(shift * 300, 300, n)).astype(int)
    delta = chars_a - chars_b
    p = 1 / (1 + np.exp(-(theta + phi * np.tanh(delta / delta.std()))))
    return (rng.random(n) < p).astype(float), chars_a, chars_b


def test_length_control_recovers_the_effect_at_equal_length():
    truth = 1 / (1 + np.exp(-0.5))
    rng, hits, raw, controlled = np.random.default_rng(3), [], [], []
    for _ in range(60):
        score, a, b = lengths_and_scores(rng)
        found = length_controlled(score, a, b).win_rate
        hits.append(found.low <= truth <= found.high)
        raw.append(score.mean())
        controlled.append(found.value)
    assert np.mean(controlled) == pytest.approx(truth, abs=0.01)
    assert np.mean(raw) > truth + 0.08, "without control, length passes for quality"
    assert np.mean(hits) > 0.88


def test_length_control_is_the_maximum_likelihood_fit():
    from sklearn.linear_model import LogisticRegression

    score, a, b = lengths_and_scores(np.random.default_rng(0))
    x = np.tanh((a - b) / np.std(a - b))[:, None]
    reference = LogisticRegression(C=100, tol=1e-10, max_iter=1000).fit(x, score)
    found = length_controlled(score, a, b)
    assert found.win_rate.value == pytest.approx(1 / (1 + np.exp(-reference.intercept_[0])), abs=1e-3)
    assert found.slope.value == pytest.approx(reference.coef_[0, 0], abs=5e-3)


def test_length_control_survives_a_clean_sweep_and_equal_lengths():
    swept = length_controlled([1.0] * 30, range(30), range(30, 0, -1)).win_rate
    assert 0.9 < swept.value <= 1 and np.isfinite([swept.low, swept.high]).all()
    equal = length_controlled([1, 0, 1, 1] * 10, [5] * 40, [5] * 40).win_rate
    assert equal.value == pytest.approx(0.75, abs=1e-3)


def test_bootstrap_agrees_with_scipy():
    x = np.random.default_rng(0).gamma(2, size=300)
    reference = stats.bootstrap((x,), np.mean, n_resamples=9999, method="percentile", rng=1).confidence_interval
    ours = bootstrap(x, resamples=9999)
    assert (ours.low, ours.high) == pytest.approx((reference.low, reference.high), abs=0.01)
    assert ours.value == pytest.approx(x.mean())


def test_equal_outcomes_are_not_certain():
    won = share([1.0] * 20)
    assert won.value == 1 and won.high == 1 and 0.7 < won.low < 0.9
    assert share([]).n == 0


def test_few_losses_are_not_surer_than_none():
    """Nineteen wins and a tie say no more than twenty wins: nor do few losses among many prompts."""
    for n in (20, 40, 100):
        won, tied, lost = (share([1.0] * (n - 1) + [last]) for last in (1.0, 0.5, 0.0))
        assert lost.low < tied.low < won.low and won.high == 1 and tied.high > 0.99
        mirrored = share([0.0] * (n - 1) + [0.5])
        assert (mirrored.low, mirrored.high) == pytest.approx((1 - tied.high, 1 - tied.low), abs=0.01)
    assert share([1.0] * 19 + [0.5]).low == pytest.approx(0.7995, abs=0.0005)
    even = [1.0, 0.0] * 30
    assert share(even) == bootstrap(even), "where both sides are many, nothing changes"


@pytest.mark.parametrize("n", [4, 6, 12, 19])
@pytest.mark.parametrize("p", [(0.3, 0.2, 0.5), (0.1, 0.0, 0.9)])
def test_win_rates_of_few_prompts_cover_what_they_promise(n, p):
    """Wilson's interval: a little under 95 % at an unlucky share, never far; the bootstrap of six is at 85 %."""
    found = coverage(lambda rng: rng.choice([0, 0.5, 1], n, p=p), lambda x: share(x), np.dot(p, [0, 0.5, 1]))
    assert found > 0.87
    estimate = share([1.0] * (n - 1) + [0.0])
    assert 0 < estimate.low < estimate.value < estimate.high < 1


def test_equal_values_have_no_interval():
    for values in ([3.0], [3.0, 3.0, 3.0], [0.1 + 0.2, 0.3]):
        for found in (t_interval(values), bootstrap(values)):
            assert (found.low, found.high, found.n) == (-np.inf, np.inf, len(values))
            assert found.text() == f"{values[0]:+.2f} (no interval, n={len(values)})"
    between, _ = over_seeds([{"p": 1.0, "q": 0.0}, {"p": 1.0, "q": 1.0}])
    assert (between.low, between.high) == (0, 1), "no win rate lies outside"


def test_length_control_is_not_fitted_to_few_prompts():
    score, a, b = lengths_and_scores(np.random.default_rng(1), n=FEW)
    assert np.isfinite(length_controlled(score, a, b).win_rate.value)
    fewer = length_controlled(score[1:], a[1:], b[1:])
    assert np.isnan([fewer.win_rate.value, fewer.slope.value]).all() and fewer.win_rate.n == FEW - 1


def test_seeds_and_prompts_are_two_intervals():
    seeds = [{f"p{i}": float(i < limit) for i in range(40)} for limit in (20, 24, 28)]
    between, prompts = over_seeds(seeds)
    assert between.value == prompts.value == pytest.approx(0.6)
    assert (between.n, prompts.n) == (3, 40)
    assert between.high - 0.6 == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3))


def test_buckets_hold_everyone_once():
    table = by_length([1, 1, 0, 0], [10, 20, 30, 40], [40, 30, 20, 10], buckets=2)
    assert [(r["longer_from"], r["longer_to"], r["value"], r["n"]) for r in table] == [
        (-30, -10, 1.0, 2),
        (10, 30, 0.0, 2),
    ]


def test_correlation_matches_scipy():
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    y = x + rng.normal(size=60)
    reference = stats.pearsonr(x, y)
    found = correlation(x, y)
    interval = reference.confidence_interval()
    assert (found["pearson"], found["low"], found["high"]) == pytest.approx(
        (reference.statistic, interval.low, interval.high)
    )
