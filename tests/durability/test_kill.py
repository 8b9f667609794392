"""Killed anywhere, a run goes on to the very weights and numbers of an undisturbed one, and pays for no label twice.

benchmarks/kills.py does the same a hundred times, and at every single write.
"""

import random

import pytest

from dualign.run.folder import Run
from dualign.run.replay import replay, stored
from killing import Case, at_random
from runs_common import metrics


def surely(seed, case):
    """Two kills at random instants; before them one at a random write, which comes however fast the machine is."""
    yield {"kill_at": random.Random(seed).randrange(case.writes // 4, case.writes)}
    yield from at_random(seed, case.seconds, 2)


@pytest.mark.parametrize(("algo", "processes"), [("dar", 1), ("grpo", 2), ("ppo", 1), ("dpo", 2)])
def test_a_killed_run_is_the_same_run(algo, processes, zygote, tiny, tmp_path):
    case = Case(zygote, tmp_path, tiny, algo, processes)
    result = case.disturbed(surely(processes, case))
    assert result.kills > 0
    assert (result.unreadable, result.different, result.bought_twice) == ([], [], 0)


def test_killed_before_and_after_writes(zygote, tiny, tmp_path):
    """The one window in which a label can be lost is between the reward function's own last act and the journal's
    write; of the points tried here none is in it."""
    case = Case(zygote, tmp_path, tiny, "dar", 1)
    points = range(40, case.writes, case.writes // 6)
    result = case.disturbed(iter([{"kill_at": point} for point in points]))
    assert result.kills >= 2
    assert (result.unreadable, result.different) == ([], [])


def test_dropout_does_not_break_it(zygote, tmp_path, tiny):
    """LoRA adapters with dropout draw random numbers in every update."""
    pytest.importorskip("peft")
    case = Case(zygote, tmp_path, tiny, "dar", 1, lora={"r": 4, "dropout": 0.2})
    result = case.disturbed(surely(7, case))
    assert result.kills > 0
    assert (result.unreadable, result.different, result.bought_twice) == ([], [], 0)


ADAPTIVE = {"kl_budget": 0.05, "alpha_rate": 0.05, "epsilon": 0.3}


@pytest.mark.parametrize(
    ("processes", "stale"),
    [(1, {"reuse": [1, 2], "ahead": 1, "settings": ADAPTIVE}), (2, {"reuse": [2], "ahead": 2})],
)
def test_older_samples_do_not_break_it(processes, stale, zygote, tiny, tmp_path):
    """What was sampled ahead belongs to a policy that no checkpoint has. An α that adapts rests on the batch of before:
    after a kill by the checkpoint, or by that batch's file."""
    case = Case(zygote, tmp_path, tiny, "dar", processes, **stale)
    run = Run.open(case.still)
    if "settings" in stale:
        assert len({record["alpha_found"] for record in metrics(case.still)}) == 4
    assert all(replay(b, run.config.algo).difference == 0 for b in stored(run))
    assert len(list((case.still / "reused").iterdir())) == {1: 5, 2: 2}[processes]
    result = case.disturbed(surely(processes, case))
    assert result.kills > 0
    assert (result.unreadable, result.different, result.bought_twice) == ([], [], 0)


def test_a_sum_of_rewards_is_the_same_sum_after_a_kill(zygote, tiny, tmp_path):
    """What is logged of each reward comes from the stored rows, not from a labelling that a replay does not do."""
    case = Case(zygote, tmp_path, tiny, "dar", 1, twice=True)
    assert all("length/absent" in record for record in metrics(case.still))
    result = case.disturbed(surely(11, case))
    assert (result.unreadable, result.different, result.bought_twice) == ([], [], 0)
