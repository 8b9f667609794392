"""What a run's summary says of the held-out reward, by hand, and where an evaluation stops."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dualign
from dualign.common.errors import StopRun
from dualign.common.intervals import FEW, bracket, half_width, plus_minus
from dualign.common.types import Label, Prompt, Rollout, user_prompt
from dualign.run.batch import Row
from dualign.run.replay import replay, stored
from dualign.run.verify import verify
from dualign.training.evaluations import in_both
from dualign.training.heldout import HeldOut, gains, kl_name
from dualign.training.view import verdict
from runs_common import tree, vowels, write_prompts


def rows(values, finishes, parts=None):
    return [
        Row(
            Rollout(i, i // 2, Prompt(str(i // 2), "?"), (1,), (2,), "a", finish, (0.0,)),
            Label(value, parts=parts[i] if parts else {}),
        )
        for i, (value, finish) in enumerate(zip(values, finishes, strict=True))
    ]


BEFORE = rows([1.0, 2.0, 0.0, 3.0], ["length", "eos", "eos", "length"])
AFTER = rows([2.0, 2.0, 4.0, None], ["eos", "eos", "length", "eos"])


def test_one_reward():
    found = gains(BEFORE, AFTER, 0.0)
    assert set(found) == {"gain", "gain_ci", "sd", "gain_sd", "gain_sd_ci", "n"} and found["n"] == 2
    sd = np.std([1, 2, 0, 3], ddof=1)
    assert found["gain"] == pytest.approx((0.5 + 2.5) / 2) and found["gain_sd"] == pytest.approx(1.5 / sd)


def test_as_trained_a_cut_off_answer_is_worth_less():
    found = gains(BEFORE, AFTER, 2.0)
    assert found["gain"] == pytest.approx(1.5), "the reward itself is as it was"
    assert found["trained"]["before"] == pytest.approx((0.5 + 0.5) / 2)
    assert found["trained"]["after"] == pytest.approx((2.0 + 2.0) / 2)
    assert found["trained"]["gain_sd"] == pytest.approx(1.5 / np.std([-1, 2, 0, 1], ddof=1))


def test_each_of_several_rewards():
    parts = [{"a": 1.0, "b": None}, {"a": 2.0}, {"a": 3.0, "b": 1.0}, {"a": 4.0, "b": 2.0}]
    later = [{"a": v["a"] + 1, "b": 5.0} for v in parts]
    values, ends = [0.0] * 4, ["eos"] * 4
    found = gains(rows(values, ends, parts), rows(values, ends, later), 1.0)["rewards"]
    assert set(found) == {"a", "b"}
    assert found["a"]["gain"] == pytest.approx(1.0) and found["a"]["gain_sd"] == pytest.approx(
        1 / np.std([1, 2, 3, 4], ddof=1)
    )
    assert found["b"]["before"] == pytest.approx(1.5) and found["b"]["gain"] == pytest.approx(3.5), "prompt 0 has no b"


def test_held_out_prompts_that_are_trained_on_are_counted():
    one, other = user_prompt("a", "hello"), user_prompt("b", "hello", system="Be brief.")
    assert in_both([one, Prompt("c", "hello")], [other]) == [], "the same words in another conversation"
    (said,) = in_both([other, one], [user_prompt("x", "hello"), user_prompt("y", "hi"), Prompt("z", "hello")])
    assert "1 of 3 held-out prompts are also in data.train" in said


def test_the_verdict_names_them():
    record = {"reward": 0.0, "kl": 1.0, "kl_ci": 0.1, "length": 3.0, "truncated": 0.5, "prompts": 2}
    said = "\n".join(verdict({"before": record, "after": record, "penalty": 2.0} | gains(BEFORE, AFTER, 2.0)))
    assert "as trained, an answer that is cut off worth 2 less: +0.500 -> +2.000" in said


def test_what_there_is_no_pair_for_has_no_interval_and_no_verdict():
    """Of three prompts two are labelled in one evaluation alone, and both answers of the third: one pair, not three."""
    ends = ["eos"] * 6
    before = rows([1.0, 1.0, 2.0, 2.0, None, None], ends)
    after = rows([1.5, 1.5, None, None, 3.0, 3.0], ends)
    found = gains(before, after, 0.0)
    assert (found["n"], found["gain"], found["gain_ci"], found["gain_sd_ci"]) == (1, 0.5, None, None)
    record = {"reward": 1.0, "kl": 1.0, "kl_ci": None, "length": 3.0, "truncated": 0.5, "prompts": 2, "absent": 1 / 3}
    said = "\n".join(verdict({"before": record, "after": record} | found))
    assert "(no interval, n=1)" in said and "1 prompt are too few" not in said and "1 prompt is too few" in said
    assert "± 0.00" not in said and "nan" not in said and "33% before and 33% after are absent" in said

    none = gains(rows([1.0, 1.0, None, None], ends[:4]), rows([None, None, 2.0, 2.0], ends[:4]), 1.0)
    assert none["n"] == 0 and none["gain"] is None and none["trained"]["n"] == 0
    said = "\n".join(verdict({"before": record, "after": record, "penalty": 1.0} | none))
    assert "no prompt has a label both before and after" in said and "nan" not in said


@pytest.mark.parametrize("prompts", [FEW - 1, FEW])
def test_a_verdict_needs_so_many_prompts(prompts):
    ends = ["eos"] * (2 * prompts)
    start = [float(i % 5) for i in range(2 * prompts)]
    found = gains(rows(start, ends), rows([v + 1 + 0.1 * (i % 3) for i, v in enumerate(start)], ends), 0.0)
    record = {"reward": 0.0, "kl": 0.0, "kl_ci": 0.1, "length": 3.0, "truncated": 0.0, "prompts": prompts}
    (said, *_) = verdict({"before": record, "after": record} | found)
    assert ("better" in said) == (prompts >= FEW) and ("too few" in said) == (prompts < FEW)


def test_equal_differences_are_no_certainty_and_equal_rewards_no_unit():
    ends = ["eos"] * 8
    found = gains(rows([0.1 * i for i in range(8)], ends), rows([0.1 * i + 0.3 for i in range(8)], ends), 0.0)
    assert found["gain"] == pytest.approx(0.3) and found["gain_ci"] is None, "0.3 but for rounding, each of them"
    flat = gains(rows([1.0] * 8, ends), rows([2.0, 2.0, 3.0, 3.0] * 2, ends), 0.0)
    assert flat["gain"] == 1.5 and flat["sd"] == 0 and flat["gain_sd"] is None
    record = {"reward": 1.0, "kl": 0.0, "kl_ci": 0.1, "length": 3.0, "truncated": 0.0, "prompts": 4}
    assert "in the reward's own units" in verdict({"before": record, "after": record} | flat)[0]


def test_what_is_said_where_there_is_no_interval():
    assert np.isnan([half_width([]), half_width([2.0]), half_width([0.1 + 0.2, 0.3, 0.3])]).all()
    assert half_width([0.0, 1.0]) == pytest.approx(12.706 / 2, abs=1e-3)
    assert plus_minus(1.0, float("nan"), 1) == plus_minus(1.0, None, 1) == "+1.00 (no interval, n=1)"
    assert plus_minus(None, None, 0) == "–" and plus_minus(0.5, 0.25, 9, "{:.1f}") == "0.5 ± 0.2"
    endless = {"value": 0.5, "low": float("-inf"), "high": float("inf"), "n": 1}
    assert bracket(endless) == bracket(endless | {"low": None, "high": None}) == "+0.50 (no interval, n=1)"


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({"temperature": 1.0, "top_p": 1.0}, "KL to π_0"),
        ({"temperature": 0.9, "top_p": 1.0}, "log(π/π_0) (T=0.9)"),
        ({"temperature": 1.0, "top_p": 0.5}, "log(π/π_0) (T=1, top-p=0.5)"),
        ({"temperature": 0.0, "top_p": 1.0}, "log(π/π_0) (greedy)"),
        ({}, "log(π/π_0) of its samples"),
    ],
)
def test_only_samples_of_the_policy_itself_estimate_a_kl(sampling, name):
    assert kl_name(sampling) == name


def test_an_evaluation_of_before_is_still_read():
    """Without the fields that came later, and with nan where there was no interval."""
    old = {"batches": 2, "prompts": 1, "reward": 0.5, "reward_ci": float("nan"), "reward_sd": 0.1, "kl": 1.0,
           "kl_ci": float("nan"), "length": 9.0, "truncated": 0.0, "absent": 0.0, "seconds": 1.0}  # fmt: skip
    assert HeldOut(**old).record() == HeldOut(**old | {"reward_ci": None, "kl_ci": None}).record()
    summary = {"before": old, "after": old, "gain": 0.1, "gain_ci": 0.0, "sd": 0.0, "gain_sd": 0.0, "gain_sd_ci": 0.0}
    assert not [line for line in verdict(summary) if "nan" in line]


def test_too_many_absent_labels_stop_an_evaluation_and_a_resume_asks_again(tiny, tmp_path):
    """Before anything is trained on, and only for the labels that are missing."""
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["eval"] = {"prompts": 8}
    asked = []

    def fitful(completions, **columns):
        asked.append(len(completions))
        return [v if i % 4 == 0 or len(asked) > 1 else None for i, v in enumerate(vowels(completions))]

    with pytest.raises(StopRun, match="evaluation after 0 online batches: 6 of 8 completions have no label, more than"):
        dualign.train(config, reward=fitful, quiet=True)
    assert asked == [8] and not list((tmp_path / "run" / "evaluations").glob("*.parquet"))
    run = dualign.train(config, reward=fitful, resume=True, quiet=True)
    assert run.read_evaluation(0)[1]["absent"] == 0 and len(run.metrics()) == 1


def test_an_evaluation_without_any_label_stops_whatever_may_be_absent(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, max_absent=1.0)
    with pytest.raises(StopRun, match="4 of 4 completions have no label, and without any there is nothing to report"):
        dualign.train(config, reward=lambda completions, **columns: [None] * len(completions), quiet=True)


def test_absent_held_out_labels_are_told_and_leave_the_pairs(tiny, tmp_path, capsys):
    """Two of five prompts are labelled in both evaluations; KL and length are of all five."""
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=2, max_absent=0.8)
    config["eval"] = {"prompts": 5}

    def fitful(completions, **columns):
        return [v if len(completions) > 5 or i < 2 else None for i, v in enumerate(vowels(completions))]

    run = dualign.train(config, reward=fitful)
    said = " ".join(capsys.readouterr().out.split())
    assert "absent 60% of the labels (2 of 5 prompts" in said and "2 prompts are too few for a verdict" in said
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["n"] == 2 and (summary["after"]["prompts"], summary["after"]["asked"]) == (2, 5)
    _, last = run.read_evaluation(2)
    kept = [row.rollout for row in run.read_evaluation(2)[0]]
    assert len(kept) == 5 and last["length"] == np.mean([len(r.completion_ids) for r in kept])
    # in fp32 the sampler's own log-probs are π_θ's, to rounding
    models = [AutoModelForCausalLM.from_pretrained(m).eval() for m in (run.saved()[-1], tiny)]
    gaps = [log_prob(models[0], r) - log_prob(models[1], r) for r in kept]
    assert last["kl"] == pytest.approx(np.mean(gaps), abs=1e-3)


@pytest.mark.parametrize("log_probs", ["recomputed", "recorded"])
def test_the_distance_to_pi_0_is_of_all_completions_of_a_batch(log_probs, tiny, tmp_path):
    """Also of those without a label; and the stored batch says the same."""
    algo = {"name": "dar", "kl_budget": 0.1}
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", algo, online_batches=2, max_absent=0.8)
    config["data"]["eval"] = None
    config["rollout"]["log_probs"] = log_probs
    config["run"]["checkpoints"] = 2

    def short_alone(completions, **columns):
        return [v if i % 2 else None for i, v in enumerate(vowels(completions))]

    run = dualign.train(config, reward=short_alone, quiet=True)
    models = [AutoModelForCausalLM.from_pretrained(m).eval() for m in (run.saved()[0], tiny)]
    b = run.read_batch(1)
    gaps = [log_prob(models[0], r.rollout) - log_prob(models[1], r.rollout) for r in b.rows]
    kl = run.metrics()[1]["kl"]
    assert b.absent == 8 and kl == pytest.approx(np.mean(gaps), abs=1e-3)
    assert kl == b.gap != pytest.approx(np.mean(gaps[1::2]), abs=1e-3), "not of the labelled half"
    assert b.stats["kl_sampled"] == pytest.approx(kl, rel=1e-6), "nor is what a budget is held against"
    assert all(replay(each, run.config.algo).difference == 0 for each in stored(run))
    assert not [finding for finding in verify(run.folder) if finding.kind == "damaged"]


def log_prob(model, rollout):
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.no_grad():
        logp = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return float(logp[len(rollout.prompt_ids) - 1 :].sum())
