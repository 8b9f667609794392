"""Completions whose rewards hardly differ: one tolerance for every system that compares them, and one count."""

from __future__ import annotations

import pytest
import torch

from dualign.algos import ALGORITHMS
from dualign.algos.dpo import DPO
from dualign.common.types import Label, Prompt, Rollout
from dualign.run.batch import Row, WeightedBatch, labelled, weigh

COMPARING = sorted(name for name, kind in ALGORITHMS.items() if kind().compares and kind.source == "online")
REWARDS = [1.0, 5.0, 3.0, 3.5, 7.0, 7.0, 2.0]  # of prompts 0, 0, 1, 1, 2, 2 and 3, which has one completion


def scored(reward: list[float]) -> WeightedBatch:
    rows = []
    for i, value in enumerate(reward):
        rollout = Rollout(i, i // 2, Prompt(str(i // 2), "p"), (1,), (2, 3), "x", "eos", (-1.0, -1.0))
        rows.append(Row(rollout, Label(value)))
    return labelled(0, rows)


def weighed(name: str, tie: float, reward: list[float]) -> WeightedBatch:
    logp_NT = torch.full((len(reward), 2), -1.0)
    return weigh(scored(reward), ALGORITHMS[name](tie=tie), logp_NT, logp_NT, None)


@pytest.mark.parametrize("name", COMPARING)
def test_a_prompt_within_the_tolerance_is_tied(name: str) -> None:
    """As if its rewards were one; others keep theirs, and the batch keeps what was said."""
    near = weighed(name, 0.5, REWARDS)
    equal = weighed(name, 0.0, [1.0, 5.0, 3.25, 3.25, 7.0, 7.0, 2.0])
    for column, value in near.batch.columns.items():
        assert torch.equal(value, equal.batch.columns[column]), column
    assert near.batch.reward_N.tolist() == REWARDS
    if "role" in near.batch.columns:
        assert near.batch["role"].tolist() == [-1, 1, 0, 0, 0, 0, 0]
    elif name != "oapl":
        assert (near.batch["advantage"][2:6] == near.batch["advantage"][2]).all()


@pytest.mark.parametrize("name", sorted(name for name, kind in ALGORITHMS.items() if kind.source == "online"))
def test_prompts_without_a_difference_are_counted(name: str) -> None:
    """Of the three with two labels."""
    algo, logp_NT = ALGORITHMS[name](), torch.full((7, 2), -1.0)
    value_NT = torch.zeros(7, 2) if algo.critic else None
    assert weigh(scored(REWARDS), algo, logp_NT, logp_NT, value_NT).stats["tied_prompts"] == pytest.approx(1 / 3)
    tolerant = algo.model_copy(update={"tie": 0.5})
    assert weigh(scored(REWARDS), tolerant, logp_NT, logp_NT, value_NT).stats["tied_prompts"] == pytest.approx(2 / 3)
    alone = scored([4.0])
    stats = weigh(alone, algo, logp_NT[:1], logp_NT[:1], None if value_NT is None else value_NT[:1]).stats
    assert "tied_prompts" not in stats


def test_a_batch_within_the_tolerance_has_no_signal() -> None:
    assert weighed("dpo", 0.5, [3.0, 3.5, 7.0, 7.25]).stats["without_signal"] == 1
    assert "without_signal" not in weighed("dpo", 0.4, [3.0, 3.5, 7.0, 7.25]).stats


def test_a_difference_of_just_the_tolerance_is_none() -> None:
    """0.8 - 0.3 is a little more than 0.5 in floating point."""
    assert weighed("dpo", 0.5, [0.3, 0.8]).stats["pairs"] == 0 and weighed("dpo", 0.49, [0.3, 0.8]).stats["pairs"] == 1
    assert DPO(tie=1).judged(scored([1, 2, 4, 5.5]).batch).reward_N.tolist() == [1.5, 1.5, 4, 5.5]
