"""Prompts whose completions all got one label teach nothing: further prompts may be asked beside them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import dualign
from dualign.common.errors import AbsentError, UserError
from dualign.common.processes import Processes
from dualign.common.types import Label, Prompt, Rollout
from dualign.config import build
from dualign.rollout.base import Request
from dualign.run.batch import Row
from dualign.run.verify import verify
from dualign.training.clock import Clock
from dualign.training.labeller import Asked
from dualign.training.source import OnlineSource
from runs_common import metrics, tree, vowels, write_prompts

LIKED = {"p1", "p2", "p5", "p7", "p8"}  # of twelve


def some_tell(completions, id, **columns):
    """The share of vowels for some prompts; others' completions are all worth the same."""
    return [value if name in LIKED else 1.0 for name, value in zip(id, vowels(completions), strict=True)]


def settings(tiny, folder, resample, **algo):
    found = tree(tiny, write_prompts(folder), folder / f"run{resample}", {"name": "grpo", **algo})
    found["rollout"]["resample"] = resample
    found["data"]["eval"] = None
    return found


@pytest.mark.parametrize("resample", [1, 4])
def test_a_further_prompt_for_each_that_is_tied(resample, tiny, tmp_path):
    plain = dualign.train(settings(tiny, tmp_path, 0), reward=some_tell, quiet=True)
    run = dualign.train(settings(tiny, tmp_path, resample), reward=some_tell, quiet=True)
    added = []
    for step in range(3):
        rows = run.batch(step).rows
        own = [row.rollout.prompt.id for row in rows if row.rollout.group < 4]
        assert own == [row.rollout.prompt.id for row in plain.batch(step).rows]
        tied = len(set(own) - LIKED)
        assert len(rows) == 16 + 4 * min(resample, tied) and len({row.rollout.index for row in rows}) == len(rows)
        assert all(row.label.value is not None for row in rows), "what was bought stays"
        added += [row.rollout.group for row in rows if row.rollout.group >= 4]
    assert added and metrics(run.folder)[-1]["labels"] == 48 + len(added)
    assert (
        metrics(run.folder)[-1]["labels"] <= build(settings(tiny, tmp_path, resample)).labels[0] == 48 + 12 * resample
    )
    assert verify(run.folder) == []
    longer = settings(tiny, tmp_path, resample)
    longer["train"]["online_batches"] = 4
    dualign.train(longer, reward=some_tell, quiet=True, resume=True)
    assert len(metrics(run.folder)) == 4


class Mended:
    """No label for the second half of each prompt's completions until it is mended; then their label tells. Every label
    that is given is bought."""

    def __init__(self):
        self.mended, self.bought = False, []

    def __call__(self, completions, id, **columns):
        values = [0.5 if i % 4 < 2 else float(i) if self.mended else None for i in range(len(id))]
        self.bought += [name for name, value in zip(id, values, strict=True) if value is not None]
        return values


def test_further_prompts_that_were_paid_for_stay_though_nothing_is_tied_any_more(tiny, tmp_path):
    config, judge = settings(tiny, tmp_path, 4), Mended()
    with pytest.raises(AbsentError):
        dualign.train(config, reward=judge, quiet=True)
    bought, judge.mended = list(judge.bought), True
    run = dualign.train(config, reward=judge, quiet=True, resume=True)
    rows = run.batch(0).rows
    assert len(bought) == 16 and len(rows) == 32, "each of four prompts was tied, and four more were asked"
    assert sum(row.label.value == 0.5 for row in rows) == 16
    assert [len(run.batch(step).rows) for step in (1, 2)] == [16, 16]


class Beside:
    """Labels every completion of prompts 0 and 2 with 1; every second one is cut off where it says so."""

    def __init__(self, cut=False):
        self.cut = cut

    def begun(self, requests, k):
        return 0

    def ask(self, requests, sampling, seed, clock):
        rows = [
            Row(
                Rollout(
                    4 * r.group + i, r.group, r.prompt, (1,), (2,), "", "length" if self.cut and i % 2 else "eos", ()
                ),
                Label(1.0 if r.group in (0, 2) else float(i)),
            )
            for r in requests
            for i in range(4)
        ]
        return Asked([row.rollout for row in rows], lambda clock: rows)


class Two(Processes):
    """One of two, in a thread of its own."""

    def everyones(self, make):
        said[self.rank] = list(make())
        both.wait(10)
        return said[0] + said[1]


said, both = {}, threading.Barrier(2)


def groups(tiny, tmp_path, processes, labeller=None, penalty=0.0):
    found = settings(tiny, tmp_path, 4)
    found["rollout"]["missing_eos_penalty"] = penalty
    requests = [Request(i, Prompt(f"p{i}", "x"), (1,)) for i in range(12)]
    source = OnlineSource(build(found), processes, labeller or Beside(), requests)
    return {row.rollout.group for row in source.ask(0, Clock()).rows(Clock())}


def test_how_many_further_prompts_there_are_rests_on_no_number_of_processes(tiny, tmp_path):
    """All prompts that are tied are the first process's, and half of the further ones."""
    with ThreadPoolExecutor(2) as pool:
        one, two = pool.map(lambda rank: groups(tiny, tmp_path, Two(rank, 2)), (0, 1))
    assert one | two == groups(tiny, tmp_path, Processes()) == set(range(6))


def test_what_is_tied_is_the_reward_that_is_trained_on(tiny, tmp_path):
    assert groups(tiny, tmp_path, Processes(), Beside(cut=True), penalty=0.5) == set(range(4))


@pytest.mark.parametrize(("algo", "rollout", "says"), [
    ({"name": "rwr"}, {"resample": 2}, "rollout.resample: rwr does not learn from how a prompt's completions differ"),
    ({"name": "dar"}, {"resample": 2, "ahead": 1}, "rollout.resample: what follows from a batch's labels"),
])  # fmt: skip
def test_where_it_makes_no_sense_it_is_refused(algo, rollout, says, tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", algo)
    config["rollout"] |= rollout
    with pytest.raises(UserError, match=says):
        build(config)
