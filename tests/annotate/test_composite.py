"""Several rewards as one: normalised, gates, minimum, product, ensembles; alone, nested, and in whole small runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest

import dualign
from command import dualign as command
from dualign.annotate import RewardSettings, build
from dualign.annotate.base import Item, label_all
from dualign.annotate.composite import MinimumReward
from dualign.annotate.normalised import RAW, normalised, unnormalised
from dualign.annotate.registry import REWARDS
from dualign.annotate.settings import FunctionReward
from dualign.common.errors import UserError
from dualign.common.types import Label, Prompt
from dualign.config import build as configuration
from dualign.config import dump
from dualign.run.digests import of_reward
from dualign.run.folder import Run
from dualign.run.verify import verify
from runs_common import metrics, reward_file, tree, vowels, write_prompts

ITEMS = [Item(i, i // 2, Prompt(str(i // 2), "x", {"kind": "ab"[i // 2 % 2], "i": i}), "y") for i in range(6)]
ONE = [1.0, 3.0, 4.0, 4.0, 2.0, 10.0]
TWO = [5.0, 1.0, 0.5, None, -1.0, 0.0]
CODE = "ONE = [1.0, 3.0, 4.0, 4.0, 2.0, 10.0]\nTWO = [5.0, 1.0, 0.5, None, -1.0, 0.0]\n" + (
    "def one(completions, i):\n    return [ONE[n] for n in i]\ndef two(completions, i):\n    return [TWO[n] for n in i]\n"
)
SHIPPED = Path(__file__).parents[1] / "support" / "runs_common.py"


@pytest.fixture
def code(tmp_path, monkeypatch):
    """Rewards `one` and `two` of six completions; two has no label for the fourth."""
    (tmp_path / "both.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def reward(function, **keys):
    return {"type": "function", "path": f"both.py:{function}", **keys}


def settings(*trees):
    return [REWARDS[t["type"]].model_validate(t) for t in trees]


def labels(*trees) -> list[Label]:
    return label_all(build(settings(*trees)), ITEMS)


def values(*trees) -> list[float | None]:
    return [label.value for label in labels(*trees)]


# --- normalised ---


def test_a_group_is_normalised_by_its_own_mean_and_deviation(code):
    found = labels(reward("one", normalise="group", weight=2.0), reward("two", optional=True))
    z = [-(2**-0.5), 2**-0.5, 0, 0, -(2**-0.5), 2**-0.5]  # of two values, (x - mean)/sd is ±1/√2
    expected = [2 * a + (b or 0) for a, b in zip(z, TWO, strict=True)]
    assert [x.value for x in found] == pytest.approx(expected)
    assert [x.parts["one"] for x in found] == ONE and [x.parts["two"] for x in found] == TWO
    assert [x.parts[RAW] for x in found] == [2 * a + (b or 0) for a, b in zip(ONE, TWO, strict=True)]


def test_a_batch_is_normalised_over_its_labelled_values_after_clip(code):
    found = values(reward("two", normalise="batch", clip=[-0.5, 2.0], optional=True), reward("one", weight=0.0))
    clipped = np.clip([v for v in TWO if v is not None], -0.5, 2.0)
    z = list((clipped - clipped.mean()) / clipped.std(ddof=1))
    assert found == pytest.approx([*z[:3], 0.0, *z[3:]])


def test_equal_values_and_one_alone_are_zero_and_none_is_nan():
    equal = {0: 0.1 + 0.2, 1: 0.3, 2: 0.3, 3: 7.0}
    assert normalised(equal, {0: 0, 1: 0, 2: 0, 3: 1}) == dict.fromkeys(range(4), 0.0)
    wide = normalised({0: 1e300, 1: -1e300, 2: 0.0}, dict.fromkeys(range(3), 0))
    assert wide == pytest.approx({0: 1.0, 1: -1.0, 2: 0.0})
    assert normalised({}, {}) == {}


def test_the_order_of_the_values_is_nothing_to_them():
    draw = random.Random(0)
    some = {i: draw.gauss(0, 10) for i in range(999)}
    scope = {i: i % 3 for i in some}
    other = list(some.items())
    draw.shuffle(other)
    assert normalised(some, scope) == normalised(dict(other), scope), "to the bit"


def test_what_is_held_out_is_not_normalised():
    label = Label(0.0, parts={"a": 3.0, RAW: 6.0}, note="n")
    assert unnormalised(label) == Label(6.0, parts={"a": 3.0}, note="n")
    assert unnormalised(Label(2.0, parts={"a": 2.0})) == Label(2.0, parts={"a": 2.0})


# --- gates ---


@pytest.mark.parametrize(
    ("gate", "passes"),
    [
        ({"at_least": 3.0}, [False, True, True, True, False, True]),
        ({"at_most": 3.0}, [True, True, False, False, True, False]),
        ({"at_least": 2.0, "at_most": 4.0}, [False, True, True, True, True, False]),
    ],
)
def test_a_gate_adds_nothing_and_closes(code, gate, passes):
    found = labels(reward("one", gate={**gate, "otherwise": -9.0}), reward("two", optional=True, weight=2.0))
    assert [x.value for x in found] == [
        None if b is None else 2 * b if through else -9.0 for b, through in zip(TWO, passes, strict=True)
    ], "where nothing that adds has a label, a gate makes none"
    assert [x.parts["one"] for x in found] == ONE


def test_an_absent_gate_is_absent_unless_it_is_optional(code):
    strict = labels(reward("two", gate={"at_least": 0.0}), reward("one"))
    assert [x.value for x in strict] == [1.0, 3.0, 4.0, None, 0.0, 10.0] and "two: " in str(strict[3].reason)
    lenient = values(reward("two", gate={"at_least": 0.0}, optional=True), reward("one"))
    assert lenient == [1.0, 3.0, 4.0, 4.0, 0.0, 10.0], "where it has no label it decides nothing"
    elsewhere = values(reward("one", gate={"at_least": 99.0}, where={"kind": "b"}), reward("one"))
    assert elsewhere == [1.0, 3.0, 0.0, 0.0, 2.0, 10.0], "rows that a gate is not for pass"


def test_a_needed_reward_that_is_absent_is_absent_behind_a_closed_gate(code):
    assert values(reward("one", gate={"at_least": 99.0}), reward("two")) == [0.0, 0.0, 0.0, None, 0.0, 0.0]


def test_gates_alone_are_refused(code):
    with pytest.raises(UserError, match="all are gates"):
        build(settings(reward("one", gate={"at_least": 0.0})))
    for keys, told in (
        ({"gate": {}}, "at_least, at_most or both"),
        ({"gate": {"at_least": 1.0}, "weight": 2.0}, "leave out its weight"),
        ({"gate": {"at_lest": 1.0}}, "no such key; did you mean reward.0.gate.at_least"),
        ({"normalise": "row"}, "'none', 'group' or 'batch'"),
    ):
        with pytest.raises(UserError, match=told):
            configuration({"model": {"name": "m"}, "data": {"train": "t"}, "reward": [reward("one", **keys)],
                           "train": {"online_batches": 1}, "run": {"dir": "r"}})  # fmt: skip


# --- made of rewards ---


def test_minimum_product_and_ensemble(code):
    both = [reward("one"), reward("two", weight=2.0)]
    first = labels({"type": "minimum", "of": both})
    assert [x.value for x in first] == [1.0, 2.0, 1.0, None, -2.0, 0.0]
    assert first[0].parts == {"one": 1.0, "two": 5.0} and first[3].parts == {"one": 4.0, "two": None}
    assert values({"type": "product", "of": both}) == [10.0, 6.0, 4.0, None, -4.0, 0.0]
    found = labels({"type": "ensemble", "k": 2.0, "of": [both[0], {**both[1], "optional": True}]})
    pairs = [(a, None if b is None else 2 * b) for a, b in zip(ONE, TWO, strict=True)]
    assert [x.value for x in found] == [
        None if b is None else pytest.approx(np.mean([a, b]) - 2 * np.std([a, b], ddof=1)) for a, b in pairs
    ], "one label alone has no deviation"
    assert values({"type": "minimum", "of": [both[0], {**both[1], "optional": True}]})[3] == 4.0


def test_they_nest_and_enter_a_sum_as_any_reward(code):
    inner = {"type": "product", "of": [reward("one"), reward("one", name="again")], "name": "square"}
    outer = {"type": "minimum", "of": [inner, reward("two", optional=True)], "weight": 0.5, "clip": [-5.0, 5.0]}
    found = labels(outer, reward("one", name="again"))
    lower = [min(a * a, a * a if b is None else b) for a, b in zip(ONE, TWO, strict=True)]
    assert [x.value for x in found] == [0.5 * min(max(m, -5), 5) + a for m, a in zip(lower, ONE, strict=True)]
    assert found[0].parts == {"one": 1.0, "again": 1.0, "square": 1.0, "two": 5.0, "minimum": 1.0, "again_2": 1.0}
    annotator = build(settings(outer, reward("one")))
    label_all(annotator, ITEMS)
    assert {"square/seconds", "two/absent", "minimum/seconds", "one/seconds"} <= annotator.stats.keys()


def test_a_gate_within_and_a_normalised_member(code):
    gated = {"type": "minimum", "of": [reward("two", gate={"at_least": 0.6}, optional=True), reward("one")]}
    assert values(gated) == [1.0, 3.0, 0.0, 4.0, 0.0, 0.0]
    found = labels({"type": "minimum", "of": [reward("one", normalise="group"), reward("one", name="raw")]})
    assert [x.value for x in found] == pytest.approx([-(2**-0.5), 2**-0.5, 0, 0, -(2**-0.5), 2**-0.5])
    assert [x.parts[RAW] for x in found] == ONE
    held = {"type": "product", "of": [reward("one"), reward("one")], "normalise": "group", "weight": 3.0}
    (first, *_) = labels(held)
    assert first.value == pytest.approx(-3 * 2**-0.5) and first.parts["product"] == 1.0 and first.parts[RAW] == 3.0


def test_more_than_a_number_can_hold_is_absent(code):
    label, *_ = labels({"type": "product", "of": [reward("one", weight=1e300), reward("two", weight=1e300)]})
    assert label.value is None and "more than a number can hold" in str(label.reason)


def test_faults_within_are_named_by_their_key(code, tmp_path):
    def fault(member):
        with pytest.raises(UserError) as caught:
            configuration({"model": {"name": "m"}, "data": {"train": "t"}, "train": {"online_batches": 1},
                           "run": {"dir": "r"}, "reward": [{"type": "minimum", "of": [reward("one"), member]}]})  # fmt: skip
        return str(caught.value)

    assert "reward.0.of.1.weigth: no such key; did you mean reward.0.of.1.weight?" in fault(reward("one", weigth=2.0))
    assert "reward.0.of.1.type: no 'minimm'; did you mean minimum?" in fault({"type": "minimm"})
    assert "reward.0.of.1.path: missing" in fault({"type": "function"})
    with pytest.raises(UserError, match=r"of: .*at least 2"):
        configuration({"model": {"name": "m"}, "data": {"train": "t"}, "train": {"online_batches": 1},
                       "run": {"dir": "r"}, "reward": [{"type": "minimum", "of": [reward("one")]}]})  # fmt: skip
    gates = [reward("one", gate={"at_least": 0.0}), reward("one")]
    with pytest.raises(ValueError, match="2 or more members that are no gates"):
        settings({"type": "ensemble", "of": gates})
    judge = {"type": "preference", "base_url": "http://h/v1", "model": "m", "rubric": "helpfulness"}
    with pytest.raises(UserError, match="AI preference"):
        configuration({"model": {"name": "m"}, "data": {"train": "t", "eval": "t"}, "train": {"online_batches": 1},
                       "run": {"dir": "r"}, "reward": [{"type": "minimum", "of": [judge, reward("one")]}]})  # fmt: skip


ASKED = {"base_url": "http://localhost/v1", "model": "m", "price_prompt": 1.0, "price_completion": 2.0}


def test_the_plan_has_what_each_member_costs_and_is_made_of(code):
    judge = {"type": "judge", "rubric": "helpfulness", "max_tokens": 100, **ASKED}
    (one,) = settings({"type": "ensemble", "of": [judge, reward("one"), {"type": "served", **ASKED}], "weight": 2.0})
    assert one.dollars(1000) == pytest.approx(0.6 + 0.2 + 0.6)
    assert one.describe(1000).splitlines() == [
        "ensemble, weight 2.0",
        "  of.0: judge, weight 1.0, at most about 0.80 dollars for 1000 calls (assuming 600 prompt tokens each)",
        "  of.1: function, weight 1.0",
        "  of.2: served, weight 1.0, at most about 0.60 dollars for 1000 calls (assuming 600 prompt tokens each)",
    ]
    assert list(one.made_of()) == ["of.0.rubric", "of.1.path"]
    other = one.model_copy(update={"of": [one.of[0].model_copy(update={"base_url": "http://else/v1"}), *one.of[1:]]})
    assert of_reward(one) == of_reward(other), "where it is asked decides nothing"
    assert of_reward(one) != of_reward(one.model_copy(update={"k": 2.0}))
    missing = MinimumReward(of=[FunctionReward(path="both.py:nothing"), FunctionReward(path="both.py:one")])
    with pytest.raises(UserError, match=r"of\.0: .*has no 'nothing'"):
        missing.check()


def test_the_new_keys_leave_old_digests_alone(code):
    plain = settings(reward("one"))[0]
    assert not {"normalise", "gate"} & plain.decides().keys()
    assert of_reward(plain) != of_reward(plain.model_copy(update={"normalise": "batch"}))


# --- whole small runs ---


class Long(RewardSettings):
    """A type of one's own, to be a member."""

    scale: float = 1.0

    def build(self, run_dir=None):
        return lambda completions, **columns: [self.scale * len(c[0]["content"]) for c in completions]


def test_settings_given_in_python_may_hold_types_of_ones_own(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    given = MinimumReward(of=[Long(scale=2.0), Long(scale=3.0)])
    run = dualign.train(config, reward=given, quiet=True)
    stored = configuration(json.loads(json.dumps(dualign.load(run.config_file).model_dump(mode="json"))))
    assert dump(stored) == run.config_file.read_text()
    rows = run.read_batch(0).rows
    assert (
        [r.label.value for r in rows]
        == [r.label.parts["Long"] for r in rows]
        == [2 * len(r.rollout.text) for r in rows]
    )
    with pytest.raises(UserError, match="Long has no place"):
        configuration({**config, "reward": [given]})


VOWELS, OTHER = reward_file(), reward_file("whitened")
SUM = [VOWELS | {"normalise": "batch"}, OTHER | {"normalise": "group"},
       VOWELS | {"gate": {"at_least": 0.1, "otherwise": -2.0}, "name": "gate"}]  # fmt: skip
COMPOSITES = [{"type": "minimum", "of": [VOWELS, OTHER]}, {"type": "product", "of": [VOWELS, OTHER], "normalise": "group"},
              {"type": "ensemble", "of": [VOWELS, OTHER], "k": 0.5, "weight": 2.0}]  # fmt: skip


@pytest.mark.parametrize("rewards", [SUM, COMPOSITES], ids=["sum", "composites"])
def test_a_whole_run_resumes_verifies_and_is_evaluated_as_it_is(rewards, tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    run = dualign.train(config | {"reward": rewards}, quiet=True)
    said = command("resume", run.folder, "train.online_batches=2")
    assert said.code == 0, said.text
    assert [f for f in verify(run.folder) if f.kind != "unfinished"] == []
    kept, rows = metrics(run.folder), run.read_batch(1).rows
    assert [r.label.parts["vowels"] for r in rows] == vowels([[{"content": r.rollout.text}] for r in rows])
    trained, held = [[r.label for r in some] for some in (rows, run.read_evaluation(2)[0])]
    assert [whole(x.parts) for x in held] == pytest.approx([x.value for x in held]), "never normalised"
    assert [whole(x.parts) for x in trained] == pytest.approx([x.parts[RAW] for x in trained])
    assert kept[1][f"{RAW}/mean"] == pytest.approx(np.mean([x.parts[RAW] for x in trained]))
    assert kept[1]["reward"] == pytest.approx(np.mean([x.value for x in trained]), abs=1e-5)
    after = json.loads((run.folder / "summary.json").read_text())["after"]
    assert after["reward"] == pytest.approx(np.mean([x.value for x in held]))
    if rewards is SUM:
        assert [x.value for x in trained] == pytest.approx(normalised_sum(rows))
    page = tmp_path / "report.html"
    assert command("report", run.folder, "--out", page).code == 0 and "vowels" in page.read_text()


def whole(parts):
    """The reward without normalisation, made again of its parts."""
    v, w = parts["vowels"], parts["whitened"]
    if "gate" in parts:
        return v + w if v >= 0.1 else -2.0
    return min(v, w) + v * w + 2 * (np.mean([v, w]) - 0.5 * np.std([v, w], ddof=1))


def normalised_sum(rows):
    v, w = (np.array([row.label.parts[name] for row in rows]) for name in ("vowels", "whitened"))
    group = np.array([row.rollout.group for row in rows])
    z = (v - v.mean()) / v.std(ddof=1)
    for g in set(group):
        here = w[group == g]
        z[group == g] += (here - here.mean()) / (here.std(ddof=1) or 1.0)
    return np.where(v >= 0.1, z, -2.0)


def test_a_dry_run_tells_a_composite_and_gates_alone(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(config | {"reward": COMPOSITES}))
    said = command("train", recipe, "--dry-run")
    assert said.code == 0 and "reward.2: ensemble, weight 2.0\n  of.0: function, weight 1.0" in said.out
    recipe.write_text(json.dumps(config | {"reward": [reward_file() | {"gate": {"at_least": 0.0}}]}))
    said = command("train", recipe, "--dry-run")
    assert said.code == 2 and "all are gates" in said.text


def test_a_member_keeps_what_it_labelled_when_another_stops_the_run(tiny, tmp_path, monkeypatch):
    """Each member's labels are remembered alone, so that a resume asks only for what is missing."""
    (tmp_path / "stops.py").write_text(
        "from pathlib import Path\nHERE = Path(__file__).parent\n"
        "def paid(completions, **columns):\n"
        "    (HERE / 'asked').open('a').write(f'{len(completions)} ')\n    return [1.0 + i for i in range(len(completions))]\n"
        "def down(completions, **columns):\n"
        "    if not (HERE / 'up').exists():\n        raise ValueError('no model')\n"
        "    return [0.5] * len(completions)\n"
    )
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["data"]["eval"] = None
    members = [{"type": "function", "path": f"{tmp_path}/stops.py:{name}"} for name in ("paid", "down")]
    config["reward"] = [{"type": "minimum", "of": members}]
    with pytest.raises(UserError, match="no model"):
        dualign.train(config, quiet=True)
    assert "journal" in "".join(p.suffix for p in (tmp_path / "run" / "batches").iterdir())
    (tmp_path / "up").touch()
    run = dualign.train(config, resume=True, quiet=True)
    assert (tmp_path / "asked").read_text() == "16 " and {r.label.value for r in run.read_batch(0).rows} == {0.5}


def test_a_resume_may_change_how_a_member_is_asked(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    run = dualign.train(config | {"reward": COMPOSITES[:1]}, quiet=True)
    said = command("resume", run.folder, "train.online_batches=2", "reward.0.of.1.timeout=60.0")
    assert said.code == 0, said.text
    said = command("resume", run.folder, "train.online_batches=3", "reward.0.of.1.weight=2.0")
    assert said.code == 2 and "reward.0.of.1.weight cannot change on resume" in said.text


def test_two_processes_are_one_to_the_bit(zygote, tiny, tmp_path):
    """What a batch is normalised by is of all processes."""
    found = []
    for world in (1, 2):
        config = tree(tiny, write_prompts(tmp_path), tmp_path / f"run{world}", {"name": "dar"}, online_batches=1)
        config["data"]["eval"] = None
        recipe = tmp_path / f"{world}.yaml"
        recipe.write_text(json.dumps(config | {"reward": [COMPOSITES[1] | {"normalise": "batch"}, *SUM]}))
        log = tmp_path / f"{world}.log"
        done = zygote.run("train", str(recipe), log=log, processes=world)
        assert done["status"] == 0, log.read_text()[-3000:]
        found.append([row.label for row in Run.open(tmp_path / f"run{world}").read_batch(0).rows])
    assert found[0] == found[1] and len({label.value for label in found[0]}) > 3
