"""An online batch cut into updates."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import dualign
from dualign.algos import ALGORITHMS
from dualign.common.types import Label, Prompt, Rollout
from dualign.config import build
from dualign.run.batch import Row, labelled, updates
from dualign.run.metrics import batch_record
from dualign.training.view import View
from runs_common import metrics, tree, vowels


def batch(lengths):
    """One completion of each length per group of two."""
    rows = []
    for i, n in enumerate(lengths):
        rollout = Rollout(i, i // 2, Prompt(str(i // 2), "p"), (1, 2), (3,) * n, "x", "eos", (0.0,) * n)
        rows.append(Row(rollout, Label(float(i))))
    return labelled(0, rows)


def test_every_row_is_in_one_update_with_its_own_tokens():
    b = batch([1, 7, 2, 3, 30, 4, 5, 6])
    seen = []
    for tokens, part in updates(b, ALGORITHMS["grpo"](name="grpo"), 4, 0):
        assert part.mask_NT.shape == (4, tokens.width)  # no wider than its longest
        assert part.mask_NT.sum(-1).tolist() == [len(ids) for ids in tokens.completion_ids]
        assert sorted(set(part.group_N.tolist())) == sorted(set(tokens.group)) and len(set(tokens.group)) == 2
        seen += part.reward_N.tolist()
    assert sorted(seen) == [float(i) for i in range(8)]


def test_the_distance_to_pi_0_has_an_interval_over_prompts():
    """Completions of one prompt are no independent draws."""
    b = batch([1] * 6)
    gap_N = torch.tensor([0.5, 0.7, -0.3, -0.1, 0.1, 0.3])
    b = replace(b, batch=replace(b.batch, logp_old_NT=gap_N[:, None], logp_ref_NT=torch.zeros(6, 1)))
    record = batch_record(b, [], online=True)
    assert record["kl"] == pytest.approx(0.2)
    assert record["kl_ci"] == pytest.approx(4.302653 * torch.tensor([0.6, -0.2, 0.2]).std().item() / math.sqrt(3))
    view = View(build(tree("m", "p", "r", {"name": "dar"})), quiet=True)
    assert view._cells({"kl": -0.02, "kl_ci": 0.1}) == {"log(π/π_0) (T=0.9)": "-0.02 ± 0.10"}
    assert list(view._cells({"kl": -1e-8}).values()) == ["0.00"], "rounding has no sign"
    at_pi_0 = replace(b, batch=replace(b.batch, logp_old_NT=torch.zeros(6, 1)))
    assert batch_record(at_pi_0, [], online=True)["kl"] == 0 and "kl_ci" not in batch_record(at_pi_0, [], online=True)


def test_per_token_columns_are_cut_with_their_rows():
    b = batch([2, 3, 9, 1])
    marks = torch.arange(4.0)[:, None] * torch.ones(4, 9)
    b.batch.columns["advantage"] = marks
    for tokens, part in updates(b, ALGORITHMS["ppo"](name="ppo", epochs=1), 2, 0):
        assert part["advantage"].shape == (2, tokens.width)
        assert part["advantage"][:, 0].tolist() == part.reward_N.tolist()


@pytest.mark.parametrize("name", ["simpo", "offline_dpo", "sft"])
def test_an_update_without_the_longest_completion_trains(name, tiny, tmp_path):
    texts = ["a" * n for n in (1, 40, 2, 3)]
    rows = [{"prompt": f"say {t} ", "chosen": t, "rejected": t + "x"} for t in texts]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    config = tree(tiny, data, tmp_path / "run", {"name": name}, online_batches=1, online_batch=4, update_size=2)
    run = dualign.train(config, reward=vowels, quiet=True)
    assert all(math.isfinite(r["loss"]) for r in metrics(run.folder))
