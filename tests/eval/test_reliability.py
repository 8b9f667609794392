"""Krippendorff's alpha against his published example and a second derivation; biases and corrections as constructed."""

from __future__ import annotations

import itertools
import json
import math
import random
import re

import numpy as np
import pytest

import fault_server
from command import dualign as command
from dualign.annotate.agreement import Pair
from dualign.annotate.judge_sets import Choice
from dualign.annotate.labelled import load_choices, load_pairs
from dualign.annotate.preference import Verdict
from dualign.common.errors import UserError
from dualign.common.types import Prompt
from dualign.eval import best_of, bias
from dualign.eval.bias import Errors, errors_of
from dualign.eval.judge_verdict import verdict
from dualign.eval.reliability import krippendorff
from dualign.eval.statistics import Estimate
from fault_server import FaultServer

# Krippendorff (2011), section C: four observers of twelve units; None: not observed
OBSERVED = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
    [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
]
UNITS = [[x for x in unit if x is not None] for unit in zip(*OBSERVED, strict=True)]


def by_pairs(units, distance):
    """The definition: mean distance of two values of a unit, over that of any two values."""
    units = [u for u in units if len(u) > 1]
    every = [x for u in units for x in u]
    within = sum(sum(distance(a, b) for a, b in itertools.permutations(u, 2)) / (len(u) - 1) for u in units) / len(
        every
    )
    chance = sum(distance(a, b) for a, b in itertools.permutations(every, 2)) / (len(every) * (len(every) - 1))
    return 1 - within / chance


def test_alpha_is_the_published_one():
    assert krippendorff(UNITS).value == pytest.approx(0.743, abs=5e-4)
    assert krippendorff(UNITS, "interval").value == pytest.approx(0.849, abs=5e-4)


@pytest.mark.parametrize("seed", range(3))
def test_alpha_is_that_of_all_pairs_of_values(seed):
    draw = random.Random(seed)
    units = [[min(9, max(0, draw.randrange(10) // 2 + i % 5)) for _ in range(draw.randrange(5))] for i in range(40)]
    assert krippendorff(units).value == pytest.approx(by_pairs(units, lambda a, b: a != b))
    assert krippendorff(units, "interval").value == pytest.approx(by_pairs(units, lambda a, b: (a - b) ** 2))


def test_alpha_of_agreement_of_chance_and_of_nothing():
    assert krippendorff([["a", "a"], ["b", "b"]] * 20).value == 1
    draw = random.Random(0)
    chance = krippendorff([[draw.choice("ab"), draw.choice("ab")] for _ in range(1000)])
    assert chance.low < 0 < chance.high and abs(chance.value) < 0.1
    assert math.isnan(krippendorff([["a", "a"]] * 9).value) and math.isnan(krippendorff([]).value)


def pair(human, a="x", b="yy", models=(None, None), votes=None):
    return Pair("1", Prompt("1", "q"), a, b, human, votes, models)


def test_alpha_with_people_does_not_depend_on_which_is_called_a():
    draw = random.Random(1)
    said = [(draw.choice(["a", "b", "tie"]), draw.choice([1.0, -1.0, 0.0, None])) for _ in range(200)]
    turned = [({"a": "b", "b": "a", "tie": "tie"}[h], v) for h, v in said]
    found = bias.nominal_alpha([pair(h) for h, _ in said], [v for _, v in said]).value
    flipped = bias.nominal_alpha([pair(h) for h, _ in turned], [None if v is None else -v for _, v in said]).value
    assert flipped == pytest.approx(found)
    both = [[h, {1.0: "a", -1.0: "b", 0.0: "tie"}[v]] for h, v in said if v is not None]
    flip = {"a": "b", "b": "a", "tie": "tie"}
    assert found == pytest.approx(by_pairs(both + [[flip[x] for x in u] for u in both], lambda a, b: a != b), abs=2e-3)


def test_people_among_themselves():
    votes = [{"a": 3}, {"a": 2, "b": 1}, {"tie": 2}, {"b": 1}]
    units = [["a"] * 3, ["a", "a", "b"], ["tie"] * 2]
    flip = [[{"a": "b", "b": "a", "tie": "tie"}[x] for x in u] for u in units]
    found = bias.people_alpha([pair("a", votes=v) for v in votes])
    assert found.value == pytest.approx(by_pairs(units + flip, lambda a, b: a != b), abs=0.03) and found.n == 3


def test_what_is_confused():
    pairs = [pair("a"), pair("a"), pair("b"), pair("tie"), pair("tie")]
    assert bias.confusion(pairs, [1.0, -1.0, None, 0.0, 2.0]) == {
        "a": {"a": 1, "b": 1, "tie": 0, "absent": 0},
        "b": {"a": 0, "b": 0, "tie": 0, "absent": 1},
        "tie": {"a": 1, "b": 0, "tie": 1, "absent": 0},
    }


def test_length_bias_is_beyond_peoples_own():
    """People prefer the longer one in 30 of 40 pairs; the judge does in 38."""
    pairs = [pair("b" if i < 30 else "a") for i in range(40)] + [pair("a", "same", "size")]
    judge = [-1.0 if i < 38 else 1.0 for i in range(40)] + [1.0]
    found = bias.length(pairs, judge)
    assert found.value == pytest.approx(38 / 40 - 30 / 40) and found.n == 40 and found.low > 0
    turned = [pair({"a": "b", "b": "a"}[p.human], p.b, p.a) for p in pairs]
    assert bias.length(turned, [-v for v in judge]).value == pytest.approx(found.value)
    assert bias.length(pairs, [1.0 if p.human == "a" else -1.0 for p in pairs]).value == 0


def test_self_preference_is_of_pairs_with_one_answer_of_its_own():
    mine = [pair("b", models=("org/Judge-1", "other")) for _ in range(10)]
    others = [pair("a", models=("x", "y")), pair("a", models=("judge-1", "judge-1")), pair("a")]
    found = bias.own([*mine, *others], [1.0] * 5 + [-1.0] * 5 + [-1.0] * 3, "judge-1")
    assert found.value == pytest.approx(0.5) and found.n == 10


def test_position_and_what_is_gained_over_another():
    verdicts = [Verdict("a", "b")] * 30 + [Verdict("a", "a")] * 10 + [Verdict("a", None)]
    assert bias.position(verdicts).value == pytest.approx((30 + 5) / 40)
    pairs = [pair("a")] * 4 + [pair("tie")]
    assert bias.over(pairs, [1, 1, 1, 0, 1], [-1, 1, 0, None, -1]).value == pytest.approx((1 + 0 + 0.5) / 3)


def test_a_win_rate_under_known_errors_comes_back():
    """People prefer the policy in 70 % of prompts; the judge sides with them in 80 %, ties half."""
    assert Errors(0.8, 400).corrected(Estimate(0.8 * 0.7 + 0.2 * 0.3, 0.5, 0.7, 100)).value == pytest.approx(0.7)
    assert Errors(1.0, 400).corrected(Estimate(0.6, 0.5, 0.7, 9)) == Estimate(
        pytest.approx(0.6), pytest.approx(0.5), pytest.approx(0.7), 9
    ), "a judge without errors changes nothing"
    assert Errors(0.6, 4000).corrected(Estimate(0.9, 0.88, 0.92, 100)).value == 1.0, "no rate is above 1"


def test_the_corrected_interval_holds_what_it_promises():
    """Of 400 simulated studies, with the judge's error known from 300 pairs and the rate from 200 prompts."""
    rng, truth, right, held = np.random.default_rng(0), 0.65, 0.8, 0
    for _ in range(400):
        known = Errors(float((rng.random(300) < right).mean()), 300)
        prefers = rng.random(200) < truth
        said = np.where(rng.random(200) < right, prefers, ~prefers)
        mean = float(said.mean())
        half = 1.96 * math.sqrt(mean * (1 - mean) / 200)
        found = known.corrected(Estimate(mean, mean - half, mean + half, 200))
        held += found.low <= truth <= found.high
    assert 0.925 <= held / 400 <= 0.98


def test_errors_are_those_of_this_judge():
    known = [{"labellers": [{"labeller": "AI preference (m)", "rubric": "helpfulness", "share": 0.8, "pairs": 30},
                            {"labeller": "head mine", "share": 0.7, "pairs": 91},
                            {"labeller": "head poor", "share": 0.6, "pairs": 20}]},
             {"labellers": [{"labeller": "AI preference (m)", "rubric": "helpfulness", "share": 0.6, "pairs": 10}]}]  # fmt: skip
    judge = {"type": "preference", "model": "m", "rubric": "helpfulness"}
    assert errors_of(known, [judge], "f") == Errors(pytest.approx(0.75), 40)
    assert errors_of(known, [{"type": "head", "path": "a/mine.safetensors"}], "f").n == 91
    with pytest.raises(UserError, match=r"60.0% of 20 pairs, which may be chance"):
        errors_of(known, [{"type": "head", "path": "poor.safetensors"}], "f")
    with pytest.raises(UserError, match="several rewards judge here"):
        errors_of(known, [judge, judge], "f")
    for other in (judge | {"rubric": "harmlessness"}, judge | {"type": "judge"}, judge | {"model": "n"}):
        with pytest.raises(UserError, match=r"knows nothing of .* it has AI preference \(m\) with rubric helpfulness"):
            errors_of(known, [other], "f")
    for wrong in ({}, [1], [{"labellers": [{}]}]):
        with pytest.raises(UserError, match=r"not what|knows nothing"):
            errors_of(wrong, [judge], "f")


# --- RewardBench 2 and JudgeBench ---

CHOICES = [
    {"id": "1", "prompt": "q1", "chosen": ["right quality-9"], "rejected": ["w quality-1", "w quality-2", "w quality-3"],
     "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["m", "x", "x", "x"], "subset": "Math",
     "additional_metadata": None},
    {"id": "2", "prompt": "q2", "chosen": ["right quality-2"], "rejected": ["w quality-5", "w quality-1", "w quality-1"],
     "num_correct": 1, "num_incorrect": 3, "total_completions": 4, "models": ["x", "x", "x", "x"], "subset": "Math",
     "additional_metadata": None},
    {"id": "3", "prompt": "q3", "chosen": ["red quality-8", "blue quality-7"], "rejected": ["seven quality-2"],
     "num_correct": 2, "num_incorrect": 1, "total_completions": 3, "models": ["x", "x", "x"], "subset": "Ties",
     "additional_metadata": None},
]  # fmt: skip


def written(path, rows):
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rewardbench_2_is_read_as_it_is(suffix, tmp_path):
    rows = load_choices(str(written(tmp_path / f"rb2{suffix}", CHOICES)))
    assert [(r.id, r.subset, len(r.right), len(r.wrong)) for r in rows] == [
        ("1", "Math", 1, 3), ("2", "Math", 1, 3), ("3", "Ties", 2, 1)]  # fmt: skip
    assert rows[0].prompt.messages == [{"role": "user", "content": "q1"}] and rows[0].models == ("m", "x", "x", "x")
    assert rows[0].pair.models == ("m", "x") and rows[2].pair is None


def test_the_best_of_several():
    one = Choice("1", Prompt("1", "q"), ("r",), ("a", "b", "c"), "s")
    two = Choice("2", Prompt("1", "q"), ("r", "s"), ("a",), "Ties")
    assert [best_of.credit(one, [5, *wrong]) for wrong in ([1, 2, 3], [5, 2, 3], [5, 5, 5], [6, 5, 5], [1, None, 2])] == [
        1, 0.5, 0.25, 0, None]  # fmt: skip
    assert [best_of.credit(two, scores) for scores in ([3, 2, 1], [3, 1, 1], [1, 3, 2], [3, None, 1])] == [
        1,
        0,
        0,
        None,
    ]
    assert [best_of.preferred(v) for v in ([1, 1, 1], [1, 0.5, 1], [0.5, 0.5, 0.5], [0, 1, None], [1, 0, 1])] == [
        1, 0.5, 0.25, None, 0]  # fmt: skip
    found = best_of.summary("x", [one, one, two], [1, 0, None])
    assert found["subsets"]["s"]["value"] == 0.5 and found["mean_of_subsets"] == 0.5 and found["absent"] == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_judgebench_is_read_as_it_is(suffix, tmp_path):
    rows = [{"pair_id": f"p{i}", "original_id": i, "source": "mmlu-pro-law", "question": f"q{i}",
             "response_model": "gpt-4o", "response_A": "one", "response_B": "two", "label": label}
            for i, label in enumerate(["A>B", "B>A"])]  # fmt: skip
    pairs, absent = load_pairs(str(written(tmp_path / f"jb{suffix}", rows)))
    assert [(p.id, p.a, p.b, p.human, p.models) for p in pairs] == [
        ("p0", "one", "two", "a", ("gpt-4o", "gpt-4o")), ("p1", "one", "two", "b", ("gpt-4o", "gpt-4o"))]  # fmt: skip
    assert not absent and pairs[0].prompt.messages == [{"role": "user", "content": "q0"}]
    with pytest.raises(UserError, match=r"line 1: label: expected A>B or B>A, found 'A'|row 1: label"):
        load_pairs(str(written(tmp_path / "bad.jsonl", [rows[0] | {"label": "A"}])))


def asked(server, folder, *more):
    return [
        "--rubric",
        "helpfulness",
        "--base-url",
        server.url,
        "--model",
        "m",
        "--set",
        f"cache={folder / 'c.sqlite'}",
        *more,
    ]


def test_a_judge_on_rewardbench_2(tmp_path):
    numbers = tmp_path / "a.json"
    with FaultServer() as server:
        said = command(
            "agreement", written(tmp_path / "rb2.jsonl", CHOICES), *asked(server, tmp_path), "--out", numbers
        )
    assert said.code == 0 and "best of n" in said.out, said.text
    (report,) = json.loads(numbers.read_text())
    found = {each["labeller"]: each for each in report["best_of"]}
    for name in ("AI reward (m)", "AI preference (m)"):
        assert found[name]["subsets"]["Math"]["value"] == 0.5
    assert found["AI reward (m)"]["subsets"]["Ties"]["value"] == 1 and found["AI preference (m)"]["absent"] == 1
    assert found["AI reward (m)"]["mean_of_subsets"] == 0.75


# --- a judge with known biases ---


def biased(rows, tmp_path, choose):
    """`dualign agreement` on `rows`, the judge of pairs being `choose` (1 or 2, of the request's text)."""
    numbers, page = tmp_path / "a.json", tmp_path / "page.html"
    kept = fault_server.true_choice
    fault_server.true_choice = choose
    try:
        with FaultServer() as server:
            said = command("agreement", written(tmp_path / "p.jsonl", rows), *asked(server, tmp_path),
                           "--out", numbers, "--page", page)  # fmt: skip
    finally:
        fault_server.true_choice = kept
    assert said.code == 0, said.text
    (report,) = json.loads(numbers.read_text())
    return next(r for r in report["labellers"] if r["labeller"] == "AI preference (m)"), said.out, page.read_text()


def rows_of(count, prefers):
    """Pairs whose longer answer is b; people prefer the better one, which is b where `prefers(i)` says so."""
    return [{"id": f"r{i}", "prompt": f"question {i}", "response_a": f"one {i} quality-{3 if prefers(i) == 'b' else 8}",
             "response_b": f"the other one, longer {i} quality-{5}", "label": prefers(i),
             "model_a": "m", "model_b": "other"} for i in range(count)]  # fmt: skip


def test_a_good_judge_is_usable(tmp_path):
    found, said, page = biased(rows_of(32, lambda i: "ab"[i % 2]), tmp_path, fault_server.true_choice)
    assert (found["share"], found["alpha"]["value"], found["named_first"]["value"]) == (1, 1, 0.5)
    assert found["length_bias"]["value"] == found["own_bias"]["value"] == 0
    assert found["over_length"]["value"] == 0.5
    assert "AI preference (m): usable: it agrees with people on 100.0%" in said and "usable" in page
    assert "bias:" not in said and "<script" not in page


def test_a_judge_that_goes_by_length(tmp_path):
    """And so against its own answers, which are the shorter ones."""

    def longer(text):
        first = text.find("the other one, longer")
        return 1 if 0 <= first < text.rfind("quality-8") or 0 <= first < text.rfind("quality-3") else 2

    found, said, page = biased(rows_of(30, lambda i: "ab"[i % 3 == 0]), tmp_path, longer)
    assert found["length_bias"]["value"] == pytest.approx(20 / 30) and found["length_bias"]["low"] > 0.4
    assert found["own_bias"]["value"] == pytest.approx(-20 / 30) and found["share"] == pytest.approx(1 / 3)
    assert "do not use" in said and "length bias: +66.7" in said and "self-preference" not in said
    assert "do not use" in page


def test_length_alone_is_the_better_of_two_rules():
    assert bias.length_rule([pair("a"), pair("b"), pair("b")]) == ("longer", [-1.0, -1.0, -1.0])
    assert bias.length_rule([pair("a"), pair("a"), pair("b")]) == ("shorter", [1.0, 1.0, 1.0])


def test_a_judge_that_names_the_first(tmp_path):
    """On half of the pairs; these it ties."""

    def first_on_even(text):
        number = int(re.search(r"question (\d+)", text)[1])
        return 1 if number % 2 == 0 else fault_server_choice(text)

    fault_server_choice = fault_server.true_choice
    found, said, _ = biased(rows_of(40, lambda i: "aabb"[i % 4]), tmp_path, first_on_even)
    assert found["named_first"]["value"] == pytest.approx(0.75) and found["named_first"]["low"] > 0.6
    assert found["confusion"]["a"] == {"a": 10, "b": 0, "tie": 10, "absent": 0}
    assert found["share"] == pytest.approx(0.75) and "position bias: 75.0%" in said and "usable" in said


def test_a_verdict_needs_pairs_and_says_what_is_missing():
    few = {"labeller": "x", "pairs": 19, "over_length": {"value": 0.5, "low": 0.1, "high": 0.9, "n": 19}}
    assert verdict(few, 19) == ["x: 19 pairs are too few for a verdict (20 are needed)"]
    nothing = dict.fromkeys(["named_first", "length_bias", "own_bias"])
    some = few | nothing | {"pairs": 100, "share": 0.6, "low": 0.51, "high": 0.7, "absent": 20, "rule": "longer"}
    assert verdict(some, 120) == [
        "x: usable: it agrees with people on 60.0% [51.0%, 70.0%], +50.0 [+10.0, +90.0] points over the longer answer",
        "x: 17% of the pairs have no label from it; what it says is of the rest",
    ]
    level = some | {"absent": 0, "over_length": {"value": 0.01, "low": -0.1, "high": 0.1, "n": 99}}
    assert "use with care" in verdict(level, 120)[0] and len(verdict(level, 120)) == 1
    below = level | {"rule": "shorter", "over_length": {"value": -0.1, "low": -0.2, "high": -0.05, "n": 99}}
    assert (
        "do not use" in verdict(below, 120)[0] and "less often than the shorter answer does" in verdict(below, 120)[0]
    )
    assert "no better than a coin" in verdict(level | {"low": 0.49}, 120)[0]
    assert verdict({"labeller": "one person", "pairs": 99}, 120) == []
