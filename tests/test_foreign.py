"""Other libraries' words for a setting are answered with ours."""

from __future__ import annotations

import pytest

from dualign.common.errors import UserError
from dualign.config import keys, load
from dualign.config.foreign import table


def known() -> set[str]:
    """Every key, by its path in a recipe; of a reward's as reward.0.KEY."""
    found = {"algo.name", "reward.0.type"}
    for heading, every in keys.sections():
        section = heading.partition(",")[0].replace("reward.N", "reward.0")
        found |= {f"{section}.{key.name}" for key in every}
    return found


def test_the_table_leads_to_keys_that_there_are():
    assert sorted({each.ours for each in table() if each.ours} - known()) == []
    assert {each.library for each in table()} == {"TRL", "OpenRLHF", "verl"}
    assert [each.key for each in table() if each.ours is None and not each.note] == []


def test_every_word_is_told_where_it_is_set():
    for each in table():
        if each.ours == each.key or each.key in known():
            continue  # its name is a key here, too
        with pytest.raises(UserError) as refused:
            load("quickstart", [f"{each.key}=1"])
        assert f"{each.ours} here" in str(refused.value) or "has no key here" in str(refused.value), each.key


@pytest.mark.parametrize(("override", "said"), [
    ("train.learning_rate=1", "train.learning_rate: no such key; TRL's learning_rate is train.lr here"),
    ("scale_rewards=none", "TRL's scale_rewards is algo.scale here"),
    ("algo.name=GRPO", "no 'GRPO'; did you mean grpo?"),
    ("rollout.n=4", "verl's actor_rollout_ref.rollout.n is rollout.k here"),
    ("completion_only_loss=true", "has no key here: always so"),
    ("lr=1", "lr: no such key; did you mean train.lr"),
    ("algo.gamma=1", "algo.gamma: no such key; dar has epochs, tie, alpha"),  # PPO's, not DAR's
    ("foo.bar=1", "foo: no such key$"),
])  # fmt: skip
def test_words_of_part_of_a_path(override, said):
    with pytest.raises(UserError, match=said):
        load("quickstart", [override])
