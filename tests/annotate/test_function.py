"""Python functions as rewards: TRL's calling convention, what may come back, and weighted sums."""

from __future__ import annotations

import asyncio
import threading
import time

import numpy as np
import pytest
import torch

from dualign.annotate import build
from dualign.annotate.base import BatchSession, Item, label_all
from dualign.annotate.combined import CombinedAnnotator, Term
from dualign.annotate.function import FunctionAnnotator, load_function
from dualign.annotate.settings import FunctionReward, HeadReward
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label, Prompt

CHAT = ({"role": "user", "content": "2+2?"},)
ITEMS = [Item(n, n // 2, Prompt(f"p{n // 2}", CHAT, {"answer": n // 2}), f"c{n}", (n, 9)) for n in range(4)]


def values(function, items=ITEMS, **more):
    return [label.value for label in label_all(FunctionAnnotator(function, **more), items)]


def test_calling_convention():
    seen = {}

    def reward(**kwargs):
        seen.update(kwargs)
        return [0.0] * 4

    values(reward)
    assert seen == {
        "prompts": [list(CHAT)] * 4,
        "completions": [[{"role": "assistant", "content": f"c{n}"}] for n in range(4)],
        "completion_ids": [[n, 9] for n in range(4)],
        "answer": [0, 0, 1, 1],
    }


def test_plain_text_and_missing_columns():
    items = [
        Item(0, 0, Prompt("a", "Once", {"x": 1}), " upon"),
        Item(1, 1, Prompt("b", "Twice", {"completion": "z"}), "!"),
    ]
    seen = {}

    def reward(prompts, completions, x, **kwargs):
        seen.update(prompts=prompts, completions=completions, x=x, rest=set(kwargs))
        return [1, 2]

    assert values(reward, items) == [1.0, 2.0]
    assert seen == {
        "prompts": ["Once", "Twice"], "completions": [" upon", "!"], "x": [1, None], "rest": {"completion_ids"}
    }  # fmt: skip


def test_a_function_gets_only_what_it_names():
    assert values(lambda completions, answer, tone="dry": [float(a) for a in answer]) == [0, 0, 1, 1]


NUMBERS = [1, 2.5, -3, 0]


@pytest.mark.parametrize(
    "result",
    [NUMBERS, tuple(NUMBERS), np.array(NUMBERS), torch.tensor(NUMBERS), [np.float32(1), torch.tensor(2.5), -3, 0]],
)
def test_numbers_of_every_kind(result):
    assert values(lambda completions: result) == [1.0, 2.5, -3.0, 0.0]


def test_none_is_absent_not_zero():
    labels = label_all(FunctionAnnotator(lambda completions: [1.0, None, 0.0, None], "mine"), ITEMS)
    assert [label.value for label in labels] == [1.0, None, 0.0, None] and labels[1].reason == "mine returned None"


def test_async_functions():
    async def reward(completions):
        await asyncio.sleep(0.01)
        return [len(c) for c in completions]

    assert values(reward) == [1.0] * 4


BAD = [
    (lambda completions: [1.0], "returned 1 values for 4 completions"),
    (lambda completions: [1, 2, float("nan"), 4], r"completion 2 \(prompt 'p1'\): returned nan"),
    (lambda completions: [1, float("-inf"), 3, 4], r"completion 1 \(prompt 'p0'\): returned -inf"),
    (lambda completions: ["high"] * 4, "returned 'high'; expected a number"),
    (lambda completions: [True] * 4, "returned True; expected a number"),
    (lambda completions: [[1], [2], [3], [4]], r"returned \[1\]"),
    (lambda completions: "good", "returned str, not a list"),
    (lambda completions: 1.0, "returned float, not a list"),
    (lambda completions: None, "returned NoneType, not a list"),
    (lambda completions: 1 / 0, "raised ZeroDivisionError: division by zero.*prompt 'p0'"),
    (lambda completions: exit(3), "raised SystemExit: 3"),
    (lambda completions, anwser: [], "takes 'anwser', which the data does not have.*did you mean 'answer'"),
]


@pytest.mark.parametrize(("function", "message"), BAD)
def test_bad_functions_are_named(function, message):
    with pytest.raises(UserError, match=f"(?s)reward function <lambda>.*{message}"):
        values(function)


def test_a_hanging_function_is_late_not_fatal():
    release = threading.Event()

    async def slow(completions):
        await asyncio.sleep(30)

    start = time.perf_counter()
    for function in (lambda completions: release.wait(30), slow):
        labels = label_all(FunctionAnnotator(function, timeout=0.2), ITEMS)
        assert {label.value for label in labels} == {None} and "took longer than 0.2 s" in str(labels[0].reason)
    assert time.perf_counter() - start < 10
    release.set()


def test_its_own_timeout_error_is_an_error():
    async def reward(completions):
        raise TimeoutError("the server")

    with pytest.raises(UserError, match="TimeoutError: the server"):
        values(reward, timeout=5.0)


def test_loading(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_reward.py").write_text("SIZE = 2.0\n")
    (tmp_path / "my_reward.py").write_text(
        "from neighbour_of_reward import SIZE\ndef size(completions):\n    return [SIZE] * len(completions)\nx = 1\n"
    )
    (tmp_path / "broken_reward.py").write_text("import nothing_like_this\n")
    assert values(load_function(f"{tmp_path}/my_reward.py:size")) == [2.0] * 4
    monkeypatch.chdir(tmp_path)
    assert values(load_function("my_reward:size")) == [2.0] * 4
    for path, message in [
        ("my_reward.py", "expected FILE.py:NAME"),
        ("absent.py:size", "no such file absent.py"),
        ("my_reward.py:sise", "did you mean 'size'"),
        ("my_reward.py:x", "it is no function but a value of type int"),
        ("broken_reward.py:f", "importing it raised ModuleNotFoundError.*nothing_like_this"),
        ("no_such_module_here:f", "ModuleNotFoundError"),
    ]:
        with pytest.raises(UserError, match=message):
            load_function(path)


def fixed(name, *labels):
    """An annotator with given labels, and how many items reached it before close."""

    class Fixed:
        def __init__(self):
            self.name = name
            self.added = 0

        def open(self):
            outer = self

            class Session(BatchSession):
                def add(self, item):
                    outer.added += 1
                    super().add(item)

            return Session(lambda items: [Label(v, None if v is not None else "why") for v in labels])

        def close(self):
            self.added = -1

    return Fixed()


def test_weighted_sum_and_the_absent_rule():
    a, b = fixed("a", 1.0, None, 3.0, 4.0), fixed("b", 10.0, 20.0, None, 40.0)
    strict = CombinedAnnotator([Term("a", a, 2.0), Term("b", b, -1.0)])
    labels = label_all(strict, ITEMS)
    assert [label.value for label in labels] == [-8.0, None, None, -32.0]
    assert labels[0].parts == {"a": 1.0, "b": 10.0} and labels[1].parts == {"a": None, "b": 20.0}
    assert labels[1].reason == "a: why"
    assert strict.stats["a/absent"] == 0.25 and strict.stats["b/seconds"] >= 0
    lenient = CombinedAnnotator([Term("a", a, 2.0), Term("b", b, -1.0, optional=True)])
    assert [label.value for label in label_all(lenient, ITEMS)] == [-8.0, None, 6.0, -32.0]
    none = fixed("c", None, None, None, None)
    both = CombinedAnnotator([Term("b", b, optional=True), Term("c", none, optional=True)])
    assert [label.value for label in label_all(both, ITEMS)] == [10.0, 20.0, None, 40.0]


def test_items_reach_every_term_as_they_come():
    a, b = fixed("a"), fixed("b")
    combined = CombinedAnnotator([Term("a", a), Term("b", b)])
    session = combined.open()
    for n, item in enumerate(ITEMS, 1):
        session.add(item)
        assert (a.added, b.added) == (n, n)
    combined.close()
    assert (a.added, b.added) == (-1, -1)


def test_terms_are_labelled_side_by_side():
    barrier = threading.Barrier(2, timeout=10)  # breaks unless both calls are in flight together

    def meet(completions):
        barrier.wait()
        return [1.0] * len(completions)

    annotator = build([], [meet, meet])
    labels = label_all(annotator, ITEMS)
    assert [label.value for label in labels] == [2.0] * 4
    assert set(labels[0].parts) == {"meet", "meet_2"}


def test_a_stop_reaches_the_run():
    class Spent:
        name = "spent"

        def open(self):
            def stop(items):
                raise StopRun("no money left")

            return BatchSession(stop)

        def close(self):
            pass

    with pytest.raises(StopRun, match="no money left"):
        label_all(CombinedAnnotator([Term("spent", Spent()), Term("a", fixed("a", 1, 2, 3, 4))]), ITEMS)


def test_build(tmp_path):
    (tmp_path / "r.py").write_text("def one(completions):\n    return [1.0] * len(completions)\n")
    path = f"{tmp_path}/r.py:one"
    assert isinstance(build([FunctionReward(path=path)]), FunctionAnnotator)
    halved = build([FunctionReward(path=path, name="half", weight=0.5)])
    assert [(x.value, x.parts) for x in label_all(halved, ITEMS[:1])] == [(0.5, {"half": 1.0})]
    with pytest.raises(UserError, match="no reward"):
        build([])


def test_rewards_by_column_label_their_own_rows_and_no_others():
    from dualign.annotate.base import Item, label_all
    from dualign.annotate.combined import CombinedAnnotator, Term
    from dualign.annotate.function import FunctionAnnotator
    from dualign.common.types import Prompt

    seen = []

    def one(completions, kind):
        seen.append(kind)
        return [1.0] * len(completions)

    def two(completions):
        return [2.0] * len(completions)

    rewards = CombinedAnnotator(
        [
            Term("one", FunctionAnnotator(one), weight=10.0, where={"kind": "a"}),
            Term("two", FunctionAnnotator(two), where={"kind": "b"}),
        ]
    )
    kinds = ["a", "b", "c", "a"]
    labels = label_all(rewards, [Item(i, i, Prompt(str(i), "x", {"kind": k}), "y") for i, k in enumerate(kinds)])
    assert [label.value for label in labels] == [10.0, 2.0, None, 10.0]
    assert seen == [["a", "a"]]
    assert "none of their `where` matches" in labels[2].reason
    assert labels[0].parts == {"one": 1.0} and labels[1].parts == {"two": 2.0}


def test_a_bounded_reward_is_clipped_before_it_is_weighted_and_kept_as_it_was() -> None:
    rewards = CombinedAnnotator([Term("a", fixed("a", -5, 0.5, 9), weight=2.0, clip=(-1.0, 1.0))])
    labels = label_all(rewards, ITEMS[:3])
    assert [label.value for label in labels] == [-2.0, 1.0, 2.0]
    assert [label.parts["a"] for label in labels] == [-5, 0.5, 9]


@pytest.mark.parametrize("bounds", [[1.0, 1.0], [2.0, 1.0], [1.0]])
def test_bounds_that_are_none_are_refused(bounds: list[float]) -> None:
    with pytest.raises(ValueError, match="clip"):
        HeadReward(clip=bounds)
