"""Prompts whose completions all got one label teach nothing: further prompts may be asked beside them."""

from __future__ import annotations

import pytest

import dualign
from dualign.common.errors import UserError
from dualign.config import build
from dualign.run.verify import verify
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


@pytest.mark.parametrize(("algo", "rollout", "says"), [
    ({"name": "rwr"}, {"resample": 2}, "rollout.resample: rwr does not learn from how a prompt's completions differ"),
    ({"name": "dar"}, {"resample": 2, "ahead": 1}, "rollout.resample: what follows from a batch's labels"),
])  # fmt: skip
def test_where_it_makes_no_sense_it_is_refused(algo, rollout, says, tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", algo)
    config["rollout"] |= rollout
    with pytest.raises(UserError, match=says):
        build(config)
