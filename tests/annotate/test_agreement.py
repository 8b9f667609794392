"""Agreement, kappa, intervals, ceilings and correlations against independent implementations and hand counts."""

import math
import random

import numpy as np
import pytest

from dualign.annotate import agreement
from dualign.annotate.agreement import Pair
from dualign.annotate.preference import Verdict
from dualign.common.types import Prompt
from shared import shared


def pair(human: str, votes: dict[str, int] | None = None, a: str = "x", b: str = "yy") -> Pair:
    return Pair("1", Prompt("1", "q"), a, b, human, votes)  # type: ignore[arg-type]


def test_share_ties_and_absent() -> None:
    pairs = [pair("a"), pair("a"), pair("b"), pair("b"), pair("tie"), pair("a")]
    found = agreement.measure("x", pairs, [1.0, -2.0, -0.5, 0.0, 1.0, None])
    assert (found.pairs, found.absent, found.human_ties) == (4, 1, 1)
    assert found.share == (1 + 0 + 1 + 0.5) / 4
    assert found.ties == 1 / 5


def test_nothing_labelled_is_not_a_number() -> None:
    found = agreement.measure("x", [pair("a")], [None])
    assert found.pairs == 0 and math.isnan(found.share) and math.isnan(found.kappa)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (5, 10), (10, 10), (214, 346), (1, 1)])
def test_wilson_is_scipys(k: int, n: int) -> None:
    from scipy.stats import binomtest

    low, high = agreement.wilson(k, n)
    reference = binomtest(k, n).proportion_ci(0.95, "wilson")
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_sklearns_on_both_orientations(seed: int) -> None:
    from sklearn.metrics import cohen_kappa_score

    rng, flip = random.Random(seed), {"a": "b", "b": "a", "tie": "tie"}
    judged = [
        (rng.choice("ab" * 4 + "t").replace("t", "tie"), rng.choice("aab" + "t").replace("t", "tie"))
        for _ in range(200)
    ]
    both = judged + [(flip[h], flip[s]) for h, s in judged]
    assert agreement.kappa(judged) == pytest.approx(cohen_kappa_score(*zip(*both, strict=True)))


def test_kappa_of_a_judge_that_knows_nothing_is_zero_even_where_a_is_always_chosen() -> None:
    assert agreement.kappa([("a", "a"), ("a", "b")] * 50) == pytest.approx(0)
    assert agreement.kappa([("a", "a")] * 50) == 1


def test_by_order_sees_position_bias() -> None:
    pairs = [pair("a")] * 4 + [pair("b")] * 4
    first = agreement.by_order(pairs, [Verdict("a", "b")] * 8)  # always names what is shown first
    assert (first.preferred_first, first.preferred_second, first.first_named, first.consistent) == (1, 0, 1, 0)
    right = agreement.by_order(pairs, [Verdict(p.human, p.human) for p in pairs])  # type: ignore[arg-type]
    assert (right.preferred_first, right.preferred_second, right.first_named, right.consistent) == (1, 1, 0.5, 1)
    harm = agreement.by_order(pairs, [Verdict("b", "a", asks="loser")] * 8)  # the first is always called the worse one
    assert harm.first_named == 1 and harm.consistent == 0
    some = agreement.by_order([*pairs, pair("tie")], [Verdict("a", None)] * 9)
    assert some.pairs == 0 and math.isnan(some.consistent)


def test_the_human_ceiling() -> None:
    agreed = agreement.human_ceiling([pair("a", {"a": 3, "b": 0, "tie": 0})])
    assert agreed and agreed.share == 1 and agreed.kappa == 1
    split = agreement.human_ceiling([pair("a", {"a": 2, "b": 1, "tie": 0})])
    assert split and split.share == pytest.approx(1 / 3)  # (1/2 + 1/2 + 0) / 3
    assert agreement.human_ceiling([pair("a", {"a": 1, "b": 0, "tie": 0}), pair("a")]) is None


def test_pairs_that_say_nothing_do_not_narrow_the_human_ceiling() -> None:
    telling = [pair("a", {"a": 2, "b": 1, "tie": 0})] * 10
    found, alone = (agreement.human_ceiling(p) for p in (telling + [pair("tie", {"tie": 3})] * 90, telling))
    assert found and alone and (found.pairs, found.low, found.high) == (10, alone.low, alone.high)


def test_the_longer_answer() -> None:
    assert agreement.longer([pair("a", a="longer", b="x"), pair("a", a="x", b="longer"), pair("a", a="x", b="y")]) == [
        5,
        -5,
        0,
    ]


def test_granularity_is_pearsons_over_all_and_tied_rows() -> None:
    first = {
        ("1", "a"): 3.0,
        ("1", "b"): 3.0,
        ("2", "a"): 5.0,
        ("2", "b"): 1.0,
        ("3", "a"): 8.0,
        ("3", "b"): 8.0,
        ("9", "a"): 1.0,
    }
    second = {("1", "a"): 2.0, ("1", "b"): 4.0, ("2", "a"): 6.0, ("2", "b"): 2.0, ("3", "a"): 7.0, ("3", "b"): 9.0}
    found = agreement.granularity(first, second)
    assert (found.rows, found.tied_rows) == (6, 4)
    assert found.r == pytest.approx(np.corrcoef([3, 3, 5, 1, 8, 8], [2, 4, 6, 2, 7, 9])[0, 1])
    assert found.r_tied == pytest.approx(np.corrcoef([3, 3, 8, 8], [2, 4, 7, 9])[0, 1])


def test_no_variation_is_not_a_number() -> None:
    assert math.isnan(agreement.pearson([1, 1], [1, 2]))


@pytest.mark.parametrize(
    ("file", "rows", "decided"),
    [
        ("agreement/pandalm.jsonl", 755, 675),
        ("agreement/llmbar.jsonl", 335, 335),
        ("preferences/hh_harmless_test.jsonl", 346, 346),
    ],
)
def test_the_layouts_are_read_as_they_are(file: str, rows: int, decided: int) -> None:
    from dualign.annotate.labelled import load_pairs

    pairs, _ = load_pairs(str(shared(f"data/{file}")))
    assert len(pairs) == rows
    assert sum(p.human != "tie" for p in pairs) == decided
    assert all(isinstance(p.a, str) and isinstance(p.b, str) for p in pairs)
    some, _ = load_pairs(str(shared(f"data/{file}")), limit=20)
    assert len(some) == 20 and some == load_pairs(str(shared(f"data/{file}")), limit=20)[0]
