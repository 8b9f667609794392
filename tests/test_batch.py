"""An online batch cut into updates."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

import dualign
from command import dualign as command
from dualign.algos import ALGORITHMS
from dualign.common.errors import UserError
from dualign.common.types import Label, Prompt, Rollout
from dualign.config import build
from dualign.run.batch import Row, importance, labelled, updates, weigh
from dualign.run.metrics import batch_record
from dualign.training.view import View
from runs_common import metrics, tree, vowels, write_prompts


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


def test_importance_by_hand():
    """Two prompts, two completions each. log π_t - log π_sampler of each completion, its tokens added up: 0.5, -0.2, 2 and
    0, so that at a cap of 3 the factors are e^0.5, e^-0.2, 3 (for e^2 = 7.39) and 1. DAR's weights at α = 0.5, β = 0.5
    from rewards 0 to 3: advantages ∓0.5, σ = 1/√3, so exp(∓√3); log π_0 = log π_t."""
    b = batch([2, 1, 2, 3])  # its sampler says 0 of every token
    old_NT = torch.tensor([[0.2, 0.3, 0.0], [-0.2, 0.0, 0.0], [1.5, 0.5, 0.0], [0.4, -0.6, 0.2]])
    ratio_N = importance(b, old_NT, 3.0)
    expected = torch.tensor([math.exp(0.5), math.exp(-0.2), 3.0, 1.0])
    assert torch.allclose(ratio_N, expected, atol=1e-6)
    dar = ALGORITHMS["dar"](name="dar", alpha=0.5, beta=0.5)
    plain, scaled = weigh(b, dar, old_NT, old_NT, None), weigh(b, dar, old_NT, old_NT, None, ratio_N)
    assert torch.allclose(plain.batch["weight"], torch.tensor([math.exp(-(3**0.5)), math.exp(3**0.5)] * 2), atol=1e-5)
    assert torch.allclose(scaled.batch["weight"], plain.batch["weight"] * expected, atol=1e-5)
    assert scaled.stats["importance"] == pytest.approx(float(expected.mean()))
    assert importance(b, old_NT, None) is None and "importance" not in plain.stats


@pytest.mark.parametrize("system", ["dar", "grpo", "rloo"])
def test_importance_scales_the_gradient_of_its_row(system):
    """By finite algebra: the loss of each row with the factor is the factor times its loss without, KL to π_0 apart."""
    b = batch([3, 2, 4, 1])
    old_NT = -torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) * b.batch.mask_NT
    off = {"dar": {}, "grpo": {"beta": 1e-12}, "rloo": {"beta": 1e-12}}[system]
    algo, ratio_N = ALGORITHMS[system](name=system, **off), importance(b, old_NT * 0.5, 3.0)
    gradients = []
    for factor_N in (None, ratio_N):
        weighted = weigh(b, algo, old_NT, old_NT, None, factor_N)
        logp_NT = (old_NT + 0.01 * b.batch.mask_NT).requires_grad_()
        algo.loss(logp_NT, weighted.batch)[0].backward()
        gradients.append(logp_NT.grad)
    assert gradients[0].abs().sum() > 0
    assert torch.allclose(gradients[1], gradients[0] * ratio_N[:, None], atol=1e-6)


def test_importance_in_a_run_and_where_it_cannot_be(tiny, tmp_path):
    """The policy's own sampler is the policy but for rounding: factors are 1 to that; a replay is identical."""
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    config["rollout"]["importance_cap"] = 3.0
    run = dualign.train(config, reward=vowels, quiet=True)
    assert [r["importance"] for r in metrics(run.folder)] == pytest.approx([1.0] * 3, abs=1e-3)
    assert "identical" in command("replay", run.folder).out
    for changes, words in [
        ({"algo": {"name": "dpo"}}, "dpo has none; dar"),
        ({"algo": {"name": "dar", "alpha": 0.0}}, "does not need log π_t"),
        ({"rollout": {**config["rollout"], "log_probs": "recorded"}}, "log_probs"),
    ]:
        with pytest.raises(UserError, match=rf"rollout.importance_cap: .*{words}"):
            build({**config, **changes})
