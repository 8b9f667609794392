"""A Python reward with several processes: one call for the whole batch, the same labels everywhere, no deadlock."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from dualign.annotate import build
from dualign.annotate.base import BatchSession, Item
from dualign.annotate.combined import CombinedAnnotator, Term
from dualign.annotate.function import FunctionAnnotator
from dualign.annotate.remembered import Remembered
from dualign.annotate.together import Together
from dualign.common.errors import StopRun, UserError
from dualign.common.processes import Processes
from dualign.common.types import Label, Prompt, Rollout
from dualign.rollout.base import Request, Sampling
from dualign.run.journal import Journal
from dualign.training.clock import Clock
from dualign.training.labeller import Labeller

ITEMS = [Item(i, i // 2, Prompt(str(i // 2), "x", {"kind": "ab"[i // 2 % 2]}), "y" * (1 + i * i)) for i in range(12)]


class Group:
    """Processes as threads."""

    def __init__(self, world: int) -> None:
        self.world, self.here = world, threading.Barrier(world, timeout=10)
        self.parts: list[Any] = [None] * world

    def run(self, work: Any) -> list[Any]:
        """What `work(member)` returns, or raises, in each."""
        with ThreadPoolExecutor(self.world) as pool:
            futures = [pool.submit(work, Member(self, rank)) for rank in range(self.world)]
            return [future.exception() or future.result() for future in futures]


class Member(Processes):
    def __init__(self, group: Group, rank: int) -> None:
        super().__init__(rank, group.world)
        object.__setattr__(self, "group", group)

    def gather(self, items: list[Any]) -> list[Any]:
        self.group.parts[self.rank] = items
        self.group.here.wait()
        found = [item for part in self.group.parts for item in part]
        self.group.here.wait()
        return found


class Whole:
    """A reward that depends on the batch: how far a length is from the mean. Remembers what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        sizes = [len(c) for c in completions]
        self.calls.append(sizes)
        return [size - sum(sizes) / len(sizes) for size in sizes]


def closed(session: Any) -> dict[int, Label]:
    return session.close()


def labels(annotator: Any, member: Member, items: list[Item]) -> dict[int, Label]:
    session = annotator.open()
    for item in items[member.rank :: member.world]:
        session.add(item)
    session.meet(closed)
    return session.close()


@pytest.mark.parametrize("world", [2, 3])
def test_a_function_sees_the_whole_batch_in_order(world: int) -> None:
    whole = Whole()
    shuffled = ITEMS[5:] + ITEMS[:5]
    parts = Group(world).run(lambda member: labels(build([], [whole], processes=member), member, shuffled))
    sizes = [len(item.completion) for item in ITEMS]
    assert whole.calls == [sizes]
    found = {i: label.value for part in parts for i, label in part.items()}
    assert found == {i: size - sum(sizes) / len(sizes) for i, size in enumerate(sizes)}


def test_an_annotator_of_ones_own_may_ask_for_the_whole_batch() -> None:
    class Ranks:
        name, whole_batch = "ranks", True

        def open(self) -> BatchSession:
            return BatchSession(lambda items: [Label(float(len(items))) for _ in items])

        def close(self) -> None:
            pass

    parts = Group(2).run(lambda member: labels(build([], [Ranks()], processes=member), member, ITEMS))
    assert {label.value for part in parts for label in part.values()} == {12.0} and all(
        len(part) == 6 for part in parts
    )


def test_a_sum_with_rows_of_its_own_is_that_of_one_process() -> None:
    def summed(member: Any, function: Whole) -> CombinedAnnotator:
        wholes = [FunctionAnnotator(function), FunctionAnnotator(lambda completions: [1.0] * len(completions), "one")]
        each = [Together(w, member) if member else w for w in wholes]
        return CombinedAnnotator([Term("w", each[0], 2.0, where={"kind": "a"}, clip=[-9.0, 9.0]), Term("one", each[1])])

    alone, shared = Whole(), Whole()
    session = summed(None, alone).open()
    for item in ITEMS:
        session.add(item)
    expected = session.close()
    parts = Group(2).run(lambda member: labels(summed(member, shared), member, ITEMS))
    assert alone.calls == shared.calls and len(shared.calls[0]) == 6
    assert {i: label for part in parts for i, label in part.items()} == expected


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_normalised_over_the_batch_is_that_of_one_process_to_the_bit(world: int, nested: bool) -> None:
    """Of an annotator that each process asks for its own share, and of one within another."""

    class Own:
        name = "own"

        def open(self) -> BatchSession:
            return BatchSession(lambda items: [Label(0.1 * len(i.completion) ** 0.5) for i in items])

        def close(self) -> None:
            pass

    def summed(processes: Processes) -> CombinedAnnotator:
        terms = [Term("own", Own(), 3.0, normalise="batch"), Term("per prompt", Own(), normalise="group")]
        found = CombinedAnnotator(terms, min, processes=processes)
        return CombinedAnnotator([Term("in", found, normalise="batch")], processes=processes) if nested else found

    session = summed(Processes()).open()
    for item in ITEMS:
        session.add(item)
    expected = session.close()
    parts = Group(world).run(lambda member: labels(summed(member), member, by_prompts(world)))
    assert {i: label for part in parts for i, label in part.items()} == expected
    assert len({label.value for label in expected.values()}) >= 6  # not all alike


def by_prompts(world: int) -> list[Item]:
    """In an order in which each of `world` processes, which take turns, gets whole prompts."""
    shares = [[item for item in ITEMS if item.group % world == rank] for rank in range(world)]
    return [shares[i % world][i // world] for i in range(len(ITEMS))]


def test_what_a_function_raises_is_raised_in_all() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise ValueError("no such column")

    found = Group(3).run(lambda member: labels(build([], [broken], processes=member), member, ITEMS))
    assert all(isinstance(error, UserError) and "no such column" in str(error) for error in found)


class Memory:
    def __init__(self, known: dict[int, Label]) -> None:
        self.known, self.added = known, {}

    ending = False

    @property
    def current(self) -> Memory:
        return self

    def labels(self, annotator: str) -> dict[int, Label]:
        return self.known

    def add_labels(self, annotator: str, labels: dict[int, Label]) -> None:
        self.added |= labels


def test_an_error_before_the_batch_is_normalised_is_raised_in_all() -> None:
    class Spent:
        name = "spent"

        def __init__(self, rank: int) -> None:
            self.rank = rank

        def open(self) -> BatchSession:
            return BatchSession(self.label)

        def label(self, items: Any) -> list[Label]:
            if self.rank:
                raise StopRun("the budget is spent")
            return [Label(1.0) for _ in items]

        def close(self) -> None:
            pass

    def work(member: Member) -> Any:
        combined = CombinedAnnotator([Term("spent", Spent(member.rank), normalise="batch")], processes=member)
        return labels(combined, member, ITEMS)

    assert [str(error) for error in Group(2).run(work)] == ["the budget is spent"] * 2


def test_what_is_remembered_stands_and_the_rest_is_labelled_with_all_of_the_batch() -> None:
    whole, memory = Whole(), Memory({0: Label(100.0), 5: Label(200.0)})
    rest = Group(2).run(
        lambda m: labels(Together(Remembered(FunctionAnnotator(whole), "0", memory, True), m), m, ITEMS)
    )
    found = {i: label.value for part in rest for i, label in part.items()}
    sizes = [len(item.completion) for item in ITEMS]
    assert [len(call) for call in whole.calls] == [12]
    assert found == {i: size - sum(sizes) / 12 for i, size in enumerate(sizes)} | {0: 100.0, 5: 200.0}
    assert set(memory.added) == set(range(12)) - {0, 5}
    memory = Memory({i: Label(float(i)) for i in range(12)})
    again = Remembered(FunctionAnnotator(whole), "0", memory, True).open()
    for item in ITEMS:
        again.add(item)
    assert again.close() == memory.known and len(whole.calls) == 1


class Sampler:
    def __init__(self, fault: Exception | None) -> None:
        self.fault = fault

    def sample(self, requests: Any, sampling: Any, seed: Any, done: Any, held: Any) -> None:
        for r in requests:
            done(Rollout(r.group, r.group, r.prompt, r.prompt_ids, (1,), "y" * (1 + r.group), "eos", (0.0,)))
            if self.fault:
                raise self.fault


@pytest.mark.parametrize("fault", [None, StopRun("out of memory"), UserError("a bad prompt")])
def test_what_stops_the_sampling_of_one_process_stops_all(fault: Exception | None) -> None:
    whole = Whole()
    requests = [Request(g, Prompt(str(g), "x"), (1,)) for g in range(6)]

    def work(member: Member) -> Any:
        sampler = Sampler(fault if member.rank else None)
        labeller = Labeller(sampler, build([], [whole], processes=member), Journal(), lambda: None, member)  # type: ignore[arg-type]
        mine = requests[member.rank :: member.world]
        return [
            (row.rollout.index, row.label.value) for row in labeller.rows(mine, Sampling(1, 4, 1.0), (0, 0), Clock())
        ]

    found = Group(2).run(work)
    if fault:
        assert [str(f) for f in found] == [str(fault)] * 2 and not whole.calls
    else:
        assert found == [[(0, -2.5), (2, -0.5), (4, 1.5)], [(1, -1.5), (3, 0.5), (5, 2.5)]]
