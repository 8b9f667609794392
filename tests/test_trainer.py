"""Whole small runs: every system trains, what it leaves behind is complete, and it goes where it should."""

import importlib.util
import json
import math
import os
import shutil
import signal
import time

import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import dualign
from command import dualign as command
from conftest import save_tiny
from dualign.algos import ALGORITHMS
from dualign.common.errors import StopRun, UserError
from dualign.config import build
from dualign.models.policy import Policy
from dualign.run.batch import update_rows
from dualign.run.folder import Run
from dualign.training.engine import Engine
from dualign.training.resume import resumed_config
from runs_common import (
    metrics,
    reward_file,
    tree,
    vowels,
    weights,
    write_demonstrations,
    write_pairs,
    write_prompts,
)


def fit(tiny, folder, algo, reward=vowels, **train):
    source = ALGORITHMS[algo["name"]].source
    data = {"online": write_prompts, "pairs": write_pairs, "demonstrations": write_demonstrations}[source](folder)
    return dualign.train(tree(tiny, data, folder / "run", algo, **train), reward=reward, quiet=True)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_every_system_trains(name, tiny, tmp_path):
    run = fit(tiny, tmp_path, {"name": name})
    records = metrics(run.folder)
    assert [r["step"] for r in records] == [0, 1, 2]
    assert all(math.isfinite(r["loss"]) and r["grad_norm"] > 0 for r in records)
    before = AutoModelForCausalLM.from_pretrained(tiny).state_dict()
    after = AutoModelForCausalLM.from_pretrained(run.saved()[-1]).state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {"before", "after", "gain_sd", "gain_sd_ci", "seconds"} <= set(summary)


def test_dar_learns(tiny, tmp_path):
    run = fit(tiny, tmp_path, {"name": "dar", "alpha": 0.1, "beta": 0.3}, online_batches=25, lr=3e-3)
    rewards = [r["reward"] for r in metrics(run.folder)]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1
    assert json.loads((run.folder / "summary.json").read_text())["after"]["kl"] > 0.1


def test_the_batch_file_holds_the_whole_story(tiny, tmp_path):
    run = fit(tiny, tmp_path, {"name": "dar"})
    table = pq.read_table(run.batch_path(0))
    rows = table.to_pylist()
    assert len(rows) == 16 and [r["index"] for r in rows] == list(range(16))
    for r in rows:
        assert len(r["completion_ids"]) == len(r["logp_old"]) == len(r["logp_ref"]) == len(r["sampler_logp"])
        expected = min(math.exp(min(r["algo.log_w_reg"] + r["algo.log_w_adv"], 50)), 20)
        assert r["algo.weight"] == pytest.approx(expected, rel=1e-5)
        assert r["algo.clipped"] == (r["algo.log_w_reg"] + r["algo.log_w_adv"] > math.log(20))
        # at the first batch π_0 = π_t
        assert r["logp_old"] == pytest.approx(r["logp_ref"], abs=1e-5)
        assert (r["completion_ids"][-1] == 256) == (r["finish"] == "eos") or r["finish"] == "length"
    assert all(r["reward"] == pytest.approx(vowels([r["completion"]])[0]) for r in rows)


def test_a_run_cannot_be_resumed_to_fewer_batches_than_are_done(tiny, tmp_path):
    run = fit(tiny, tmp_path, {"name": "dar"})
    before = sorted(p.name for p in run.evaluations_dir.iterdir())
    with pytest.raises(UserError, match=r"train\.online_batches=2: the run has done 3 already"):
        dualign.train(resumed_config(run.folder, ["train.online_batches=2"]), reward=vowels, resume=True, quiet=True)
    assert sorted(p.name for p in run.evaluations_dir.iterdir()) == before


def some(completions, **columns):
    return [1.0 + i for i, _ in enumerate(completions)]


def test_a_run_goes_on_with_its_own_rewards_and_settings_or_not_at_all(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    run = dualign.train(config, reward=some, quiet=True)
    said = command("resume", run.folder, "train.online_batches=4")  # the recipe's reward alone would be another one
    assert said.code == 2 and "its rewards came from Python: some, now none" in said.err
    more = {**config, "train": {**config["train"], "online_batches": 4}}
    with pytest.raises(UserError, match="came from Python: some, now vowels"):
        dualign.train(more, reward=vowels, resume=True, quiet=True)
    for section, key, value in (("train", "lr", 0.5), ("rollout", "max_new_tokens", 7), ("run", "seed", 7)):
        other = {**more, section: {**more[section], key: value}}
        with pytest.raises(UserError, match=rf"{section}\.{key} cannot change on resume"):
            dualign.train(other, reward=some, resume=True, quiet=True)
    with pytest.raises(UserError, match="no run here"):
        dualign.train({**more, "run": {"dir": str(tmp_path / "never")}}, reward=some, resume=True, quiet=True)
    assert len(metrics(dualign.train(more, reward=some, resume=True, quiet=True).folder)) == 4


def test_a_fixed_set_buys_no_labels(tiny, tmp_path):
    run = fit(tiny, tmp_path, {"name": "offline_dpo"})
    assert [r["labels"] for r in metrics(run.folder)] == [0, 0, 0]


def test_a_preference_cannot_measure_held_out_prompts(tiny, tmp_path):
    judged = {"type": "preference", "rubric": "helpfulness", "base_url": "http://127.0.0.1:9/v1", "model": "m"}
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dpo"}) | {"reward": [judged]}
    with pytest.raises(UserError, match=r"data\.eval: an AI preference .* eval winrate"):
        dualign.train(config, quiet=True)


def some_absent(completions, **columns):
    return [None if i % 7 == 5 else v for i, v in enumerate(vowels(completions))]


@pytest.mark.parametrize(
    "algo", [{"name": "dar"}, {"name": "grpo"}, {"name": "dual_ppo"}, {"name": "offline_dpo"}], ids=str
)
def test_recorded_log_probs_train_as_recomputed_ones(algo, tiny, tmp_path):
    """In fp32 the two differ by rounding alone; of a data set no sampler recorded any, and they are computed."""
    online = ALGORITHMS[algo["name"]].source == "online"
    kept = {}
    for kind in ("recomputed", "recorded"):
        (tmp_path / kind).mkdir()
        data = (write_prompts if online else write_pairs)(tmp_path / kind)
        config = tree(tiny, data, tmp_path / kind / "run", algo)
        config["rollout"]["log_probs"] = kind
        kept[kind] = dualign.train(config, reward=some_absent, quiet=True)
    one, two = (weights(run.folder) for run in kept.values())
    assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)
    for kind, run in kept.items():
        rows = [r for r in pq.read_table(run.batch_path(2)).to_pylist() if r["reward"] is not None]
        assert all(r.get("logp_old") == r["sampler_logp"] for r in rows) == (kind == "recorded" and online)
        if online:
            assert {r["absent"] for r in metrics(run.folder)} == {2}
            assert all((r["sampler_gap"] == 0) == (kind == "recorded") for r in metrics(run.folder))


BY_PROMPT = [{"name": "dar"}, {"name": "grpo", "beta": 0.1}, {"name": "rloo"}, {"name": "dao"}]


@pytest.mark.parametrize("size", [8, 16], ids=["two updates", "one update"])
@pytest.mark.parametrize("algo", BY_PROMPT, ids=str)
def test_the_first_updates_forward_pass_gives_its_rows_log_probs(algo, size, tiny, tmp_path, monkeypatch):
    """Trained on the spot or from the stored batches, to the bit; with a pass of its own, up to rounding. The rows of
    an online batch's first update, or of its only one, go through the policy once instead of twice."""
    passed = []
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, micro: passed.append(len(micro.rows)) or forward(self, micro))

    def trained(name, batches=3):
        (tmp_path / name).mkdir()
        config = tree(tiny, write_prompts(tmp_path / name), tmp_path / name / "run", algo)
        config["data"]["eval"] = None
        config["train"] |= {"update_size": size, "online_batches": batches}
        passed.clear()
        run = dualign.train(config, reward=some_absent, quiet=True)
        return config, run, weights(run.folder), sum(passed)

    config, run, one, _ = trained("once")
    replayed = tmp_path / "replayed"
    shutil.copytree(run.folder, replayed)
    shutil.rmtree(replayed / "checkpoints")
    config["run"]["dir"] = str(replayed)
    dualign.train(config, reward=some_absent, resume=True, quiet=True)
    again = weights(replayed)
    assert one.keys() == again.keys() and all(torch.equal(one[name], again[name]) for name in one)

    # one batch: in a later one, weights that differ in their last bits may choose another token
    config, short, one, rows = trained("short", batches=1)
    monkeypatch.setattr("dualign.training.engine.has_dropout", lambda model: True)
    _, plain, two, more = trained("twice", batches=1)
    assert all(torch.allclose(one[name], two[name], atol=1e-5) for name in one)
    a, b = (run.read_batch(0) for run in (short, plain))
    assert torch.allclose(a.batch.logp_old_NT, b.batch.logp_old_NT, atol=1e-4)
    first = [next(update_rows(a, ALGORITHMS[algo["name"]](), size, build(config).run.seed))]
    assert more - rows == sum(map(len, first)) > 0


def test_where_a_forward_pass_is_random_log_probs_have_one_of_their_own(tmp_path):
    model = save_tiny(tmp_path / "model", "gpt2")
    kept = AutoConfig.from_pretrained(model)
    for dropout in (0.0, 0.1):
        kept.attn_pdrop, kept.summary_first_dropout = dropout, 0.0
        kept.save_pretrained(model)
        engine = Engine.load(build(tree(model, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})))
        assert engine.has_dropout == (dropout > 0)


def test_the_rate_rises_stays_and_falls_also_over_a_resume(tiny, tmp_path):
    """warmup 2 of 6 updates, decay over the last half: (1/2, 1), (1, 1), (2/3, 1/3) of the rate."""
    prompts = write_prompts(tmp_path)
    straight = tree(tiny, prompts, tmp_path / "straight", {"name": "dar"}, decay=0.5)
    dualign.train(straight, reward=vowels, quiet=True)
    rates = [record["lr"] for record in metrics(tmp_path / "straight")]
    assert rates == pytest.approx([0.75e-3, 1e-3, 0.5e-3])

    parts = tree(tiny, prompts, tmp_path / "parts", {"name": "dar"}, decay=0.5)
    calls = []

    def stopping(completions, **columns):
        calls.append(1)
        if len(calls) == 4:  # an evaluation and two online batches were before
            os.kill(os.getpid(), signal.SIGTERM)
        return vowels(completions, **columns)

    with pytest.raises(StopRun):
        dualign.train(parts, reward=stopping, quiet=True)
    assert Run(tmp_path / "parts").resumable() is not None
    dualign.train(parts, reward=stopping, resume=True, quiet=True)
    assert [record["lr"] for record in metrics(tmp_path / "parts")] == rates
    for name, value in weights(tmp_path / "straight").items():
        assert torch.equal(value, weights(tmp_path / "parts")[name])
    with pytest.raises(UserError, match=r"train\.online_batches cannot change on resume where train\.decay"):
        resumed_config(tmp_path / "parts", ["train.online_batches=6"])


def test_a_skipped_update_counts_in_the_schedule(tiny, tmp_path):
    """Ties alone: nothing is learned, and the rate rises and falls all the same."""
    run = fit(
        tiny, tmp_path, {"name": "dpo"}, reward=lambda completions, **columns: [0.0] * len(completions), decay=1.0
    )
    records = metrics(run.folder)
    assert all(record["skipped"] == 1 for record in records)
    assert [record["lr"] for record in records] == pytest.approx([(0.5 + 5 / 6) / 2e3, 7 / 12e3, 3 / 12e3])


def test_trackers_get_every_batch_and_evaluation(tiny, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    config["run"] |= {"trackers": ["tensorboard"], "project": "mine"}
    dualign.train(config, reward=vowels, quiet=True)
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "mine")).Reload()
    rewards = [(e.step, e.value) for e in events.Scalars("reward")]
    assert rewards == [(m["step"], pytest.approx(m["reward"])) for m in metrics(tmp_path / "run")] and len(rewards) == 3
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    heldout = [(e.step, e.value) for e in events.Scalars("heldout/reward")]
    assert heldout == [(0, pytest.approx(summary["before"]["reward"])), (3, pytest.approx(summary["after"]["reward"]))]
    assert {"seconds/update", "heldout/kl", "loss"} <= set(events.Tags()["scalars"])


def test_a_tracker_that_is_not_installed_is_named_before_any_work(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    if importlib.util.find_spec("trackio"):
        pytest.skip("trackio is installed")
    config["run"]["trackers"] = ["trackio"]
    with pytest.raises(UserError, match=r"run\.trackers: trackio is not installed: pip install trackio"):
        dualign.train(config, reward=vowels, quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_time_of_each_reward_is_apart_from_the_phases(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    dualign.train(config, reward=[vowels, slow_vowels], quiet=True)
    (record,) = (json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert set(record["label_seconds"]) == {"vowels", "slow_vowels"} and record["label_seconds"]["slow_vowels"] >= 0.05
    assert set(record["seconds"]) == {"sample", "label", "score", "write", "update", "sync"}


def test_a_reward_is_absent_only_where_it_gave_no_label(tiny, tmp_path):
    """Not in rows that it does not apply to (`where`); and a penalty for a missing EOS is no reward that may be absent."""
    rows = [{"prompt": f"say {i}: ", "kind": "ab"[i % 2]} for i in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tree(tiny, tmp_path / "prompts.jsonl", tmp_path / "run", {"name": "dar"}, online_batches=1, max_absent=0.9)
    config["rollout"] |= {"max_new_tokens": 2, "missing_eos_penalty": 1}
    one = {"type": "function", "path": f"{__file__}:vowels"}
    config["reward"] = [one | {"where": {"kind": "a"}}, {"type": "function", "path": f"{__file__}:fitful"}]
    dualign.train(config, quiet=True)
    (record,) = metrics(tmp_path / "run")
    assert (record["vowels/absent"], record["fitful/absent"], record["fitful/mean"]) == (0.0, 0.25, 2.0)
    assert record["truncated"] > 0 and "missing_eos/absent" not in record and record["absent"] == 4

    config["run"]["dir"] = str(tmp_path / "single")
    config["reward"] = [one]
    dualign.train(config, quiet=True)
    (record,) = metrics(tmp_path / "single")
    assert not [name for name in record if "/" in name]


def fitful(completions, **columns):
    """Every fourth is absent."""
    return [2.0 if i % 4 else None for i in range(len(completions))]


def slow_vowels(completions, **columns):
    time.sleep(0.05)
    return vowels(completions, **columns)


def test_absent_labels_leave_the_batch_and_are_counted(tiny, tmp_path):
    def sometimes(completions, **columns):
        return [None if i == 5 else v for i, v in enumerate(vowels(completions))]

    run = fit(tiny, tmp_path, {"name": "dar"}, reward=sometimes)
    assert all(r["absent"] == 1 for r in metrics(run.folder))
    rows = pq.read_table(run.batch_path(0)).to_pylist()
    assert rows[5]["reward"] is None and rows[5]["absent"] and rows[5]["algo.weight"] is None
    # the group's baseline is the mean of the three that have a label
    group = [r for r in rows if r["group"] == rows[5]["group"] and r["reward"] is not None]
    raw = [r["reward"] - sum(g["reward"] for g in group) / 3 for r in group]
    assert raw[0] - raw[1] == pytest.approx(
        (group[0]["algo.advantage"] - group[1]["algo.advantage"]) * sigma(rows), rel=1e-4
    )


def sigma(rows):
    groups = {}
    for r in rows:
        if r["reward"] is not None:
            groups.setdefault(r["group"], []).append(r["reward"])
    advantages = [v - sum(g) / len(g) for g in groups.values() for v in g]
    return torch.tensor(advantages, dtype=torch.float64).std().item()


def test_too_many_absent_stop_the_run_with_the_reason(tiny, tmp_path):
    def never(completions, **columns):
        return [None] * len(completions) if len(completions) == 16 else vowels(completions)

    with pytest.raises(StopRun, match="16 of 16 completions have no label"):
        fit(tiny, tmp_path, {"name": "dar"}, reward=never)


def test_a_run_is_never_written_over(tiny, tmp_path):
    run = fit(tiny, tmp_path, {"name": "dar"})
    before = sorted((p, p.stat().st_mtime_ns) for p in run.folder.rglob("*"))
    with pytest.raises(UserError, match="already holds a run"):
        fit(tiny, tmp_path, {"name": "dar"})
    assert sorted((p, p.stat().st_mtime_ns) for p in run.folder.rglob("*")) == before


SKIPPING = {"name": "dar", "skip_below": 0.05}  # at the papers' β: some rows of a batch fall under it


@pytest.mark.parametrize(
    "algo", [{"name": "dar"}, {"name": "grpo"}, {"name": "ppo"}, {"name": "dpo"}, SKIPPING], ids=str
)
def test_two_processes_give_the_same_weights_and_losses(algo, tiny, tmp_path, zygote):
    data, found = write_prompts(tmp_path), []
    for processes in (1, 2):
        run = tmp_path / f"run{processes}"
        recipe = tmp_path / f"recipe{processes}.yaml"
        rewards = [reward_file(), reward_file("whitened")]  # the second needs to see the whole batch
        recipe.write_text(yaml.safe_dump(tree(tiny, data, run, algo) | {"reward": rewards}))
        done = zygote.run("train", str(recipe), log=tmp_path / "log", processes=processes)
        assert done["status"] == 0, (tmp_path / "log").read_text()
        found.append((weights(run), metrics(run), json.loads((run / "summary.json").read_text())["before"]["reward"]))
    (one, first, held_out), (two, second, held_out_of_two) = found
    assert held_out_of_two == pytest.approx(held_out)
    assert ("skip_below" in algo) == any(record.get("dropped_weight", 0) > 0 for record in first)
    for key in one:
        assert torch.allclose(one[key], two[key], atol=1e-5), key
    for record in (first[0], second[0]):  # before the first step a pair's margin is 0, and its sign is rounding's
        record.pop("accuracy", None)
    for a, b in zip(first, second, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_same_seed_same_bits_other_seed_other_run(tiny, tmp_path):
    runs = []
    for i, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(i)
        folder.mkdir()
        config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"})
        config["run"]["seed"] = seed
        runs.append(dualign.train(config, reward=vowels, quiet=True).folder)
    assert metrics(runs[0]) == metrics(runs[1]) != metrics(runs[2])
    assert all(torch.equal(v, weights(runs[1])[k]) for k, v in weights(runs[0]).items())


def test_a_cut_completion_is_penalised_and_its_parts_say_so(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    config["rollout"] |= {"missing_eos_penalty": 0.5, "max_new_tokens": 30}
    run = dualign.train(config, reward=vowels, quiet=True)
    rows = [r for step in range(3) for r in pq.read_table(run.batch_path(step)).to_pylist()]
    assert {r["finish"] for r in rows} == {"eos", "length"}
    for r in rows:
        own = vowels([r["completion"]])[0]
        assert r["reward"] == pytest.approx(own - 0.5 * (r["finish"] == "length"))
        if r["finish"] == "length":
            assert json.loads(r["parts"]) == pytest.approx({"reward": own, "missing_eos": -0.5})
