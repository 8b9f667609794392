"""π_0 by SFT, and preference pairs made from π_0: what one command leaves is what the next one reads."""

from __future__ import annotations

import json

import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import dualign
from dualign import config as configs
from dualign.cli import application
from dualign.cli.sft import sft_config
from dualign.common.errors import UserError
from dualign.data.rows import load_examples
from dualign.training.pairs import make_pairs
from runs_common import launch, metrics, reward_file, tree, vowels, write_demonstrations, write_pairs, write_prompts


def call(*arguments):
    return CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False)


SMALL = ("model.precision=fp32", "train.online_batch=4", "train.update_size=4", "train.lr=3e-3", "train.warmup=1")


def test_sft_makes_a_policy_that_the_next_run_starts_from(tiny, tmp_path):
    out = tmp_path / "pi0"
    said = call("sft", *SMALL, "--data", write_pairs(tmp_path), "--model", tiny, "--out", out, "--epochs", 10)
    assert f"model.name={out / 'model'}" in said.output
    losses = [r["loss"] for r in metrics(out)]
    assert len(losses) == 30  # 12 rows, 4 at a step, ten times
    assert losses[-1] < losses[0] - 0.5
    assert AutoTokenizer.from_pretrained(out / "model").chat_template
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    assert not (model.lm_head.weight == AutoModelForCausalLM.from_pretrained(tiny).lm_head.weight).all()
    prompts = write_prompts(tmp_path)
    run = dualign.train(tree(out / "model", prompts, tmp_path / "next", {"name": "dar"}), reward=vowels, quiet=True)
    assert len(metrics(run.folder)) == 3


def test_sft_learns_the_chosen_and_not_the_rejected(tiny, tmp_path):
    config = sft_config(None, SMALL, str(write_pairs(tmp_path)), str(tiny), str(tmp_path / "run"), 2)
    run = dualign.train(config, quiet=True)
    texts = {row.rollout.text for row in run.read_batch(0).rows}
    assert texts and all(set(text) == set("aei") for text in texts)


def test_sft_takes_demonstrations_recipes_and_overrides(tiny, tmp_path):
    data = str(write_demonstrations(tmp_path))
    one = sft_config(None, ["train.online_batch=6", "train.update_size=6"], data, str(tiny), "d")
    assert (one.train.online_batches, one.train.lr, one.algo.name) == (2, 5e-6, "sft")
    recipe = sft_config("paper/sft-tldr", ["run.dir=here"], data, None, None)
    assert (recipe.train.online_batches, recipe.data.train, recipe.run.dir) == (912, data, "here")
    assert sft_config("paper/sft-tldr", [], data, None, None, epochs=2).train.online_batches == 1
    with pytest.raises(UserError, match="needs --model, --out"):
        sft_config(data=data)
    with pytest.raises(UserError, match="its algo is dar"):
        sft_config("quickstart")


def test_sft_of_two_processes_leaves_one_link(tiny, tmp_path):
    paths = ("--data", str(write_pairs(tmp_path)), "--model", str(tiny), "--out", str(tmp_path / "run"))
    done = launch(*SMALL, *paths, processes=2, command="sft")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model").is_symlink() and not list((tmp_path / "run").glob(".model-*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")


def test_sft_goes_on_and_refuses_another_run(tiny, tmp_path):
    from dualign.cli.sft import make

    config = sft_config(None, SMALL, str(write_pairs(tmp_path)), str(tiny), str(tmp_path / "run"), 1)
    link = make(config)
    (tmp_path / "run" / "summary.json").unlink()
    link.unlink()
    assert make(config).resolve().name == "000003" and (tmp_path / "run" / "summary.json").is_file()
    with pytest.raises(UserError, match="other settings"):
        make(configs.build(configs.merge(config.model_dump(), {"train": {"lr": 1e-4}})))


def test_pairs_are_the_best_and_the_worst_by_the_runs_reward(tiny, tmp_path):
    base = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    out = tmp_path / "made" / "pairs.jsonl"
    said = call("pairs", tmp_path / "base.yaml", "--out", out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert f"{len(rows)} pairs of 12 prompts" in said.output and "48 labels of 48 completions" in said.output
    assert 6 <= len(rows) <= 12
    for row in rows:
        best, worst = vowels([row["chosen"], row["rejected"]])
        assert row["rewards"] == pytest.approx([best, worst]) and best > worst
        assert set(row["finish"]) <= {"eos", "length"}
    assert any("length" in row["finish"] for row in rows)
    offline = configs.load(tmp_path / "base.yaml", ["algo.name=offline_dpo", f"data.train={out}"])
    assert len(metrics(dualign.train(offline, quiet=True).folder)) == 3


def test_pairs_of_a_draw_of_the_prompts_under_the_runs_penalty(tiny, tmp_path):
    base = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    base["rollout"]["missing_eos_penalty"] = 10
    said = make_pairs(configs.build(base), tmp_path / "pairs.jsonl", limit=5)
    assert "of 5 prompts" in said and "20 labels of 20 completions" in said
    for row in map(json.loads, (tmp_path / "pairs.jsonl").read_text().splitlines()):
        raw = vowels([row["chosen"], row["rejected"]])
        cut = [10 * (reason == "length") for reason in row["finish"]]
        assert row["rewards"] == pytest.approx([v - c for v, c in zip(raw, cut, strict=True)])
        assert row["finish"] != ["length", "eos"]


def test_a_completion_that_was_cut_off_is_never_closed(tiny, tmp_path):
    pairs = [
        {"prompt": f"Say {i}", "chosen": "It ends.", "rejected": "It does not", "finish": ["eos", "length"]}
        for i in range(8)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    config = tree(tiny, tmp_path / "pairs.jsonl", tmp_path / "run", {"name": "simpo"}, online_batches=1)
    run = dualign.train(config | {"data": {"train": str(tmp_path / "pairs.jsonl")}}, quiet=True)
    for row in pq.read_table(run.batch_path(0)).to_pylist():
        cut = row["completion"] == "It does not"
        assert row["finish"] == ("length" if cut else "eos")
        assert (256 in row["completion_ids"]) == (not cut)


def test_sampled_completions_are_demonstrations_that_end_as_they_did(tiny, tmp_path):
    out, data = tmp_path / "made.jsonl", write_prompts(tmp_path)
    call("sample", tiny, data, "--max-new-tokens", "8", "--out", out)
    ended = [json.loads(line)["finish"] for line in out.read_text().splitlines()]
    assert "length" in ended
    examples = load_examples(str(out))
    assert [e.finish for e in examples] == [(finish,) for finish in ended]


@pytest.mark.parametrize("finish", ["stop", "length", ["eos"], ["eos", "max_tokens"], 1, [["eos"], "eos"]])
def test_a_finish_that_cannot_be_read_is_named(finish, tmp_path):
    row = {"prompt": "Say it", "chosen": "Yes.", "rejected": "No.", "finish": finish}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"pairs.jsonl, row 1: finish: expected a list of 2, each eos or length"):
        load_examples(str(tmp_path / "pairs.jsonl"))


def test_rows_that_are_too_long_stop_the_run_or_are_left_out(tiny, tmp_path):
    pairs = [{"prompt": f"Say {i}", "chosen": "Yes. " * (3000 if i == 5 else 1), "rejected": "No."} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(p) + "\n" for p in pairs))
    config = tree(tiny, tmp_path / "pairs.jsonl", tmp_path / "run", {"name": "offline_dpo"}, online_batches=2)
    config["data"] = {"train": str(tmp_path / "pairs.jsonl")}
    with pytest.raises(
        UserError, match=r"row pairs.jsonl:6: its prompt of \d+ tokens and completion of .*data.bad_rows=skip"
    ):
        dualign.train(config, quiet=True)
    config["data"]["bad_rows"] = "skip"
    run = dualign.train(config, quiet=True)
    assert all(
        row["prompt_id"] != "pairs.jsonl:6" for i in (0, 1) for row in pq.read_table(run.batch_path(i)).to_pylist()
    )
    config["data"]["max_prompt_tokens"] = 1
    config["run"]["dir"] = str(tmp_path / "other")
    with pytest.raises(UserError, match="no rows are left"):
        dualign.train(config, quiet=True)


def test_pairs_need_a_reward_and_a_difference(tiny, tmp_path):
    config = configs.build(tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}))
    with pytest.raises(UserError, match="reward: none given"):
        make_pairs(config, tmp_path / "pairs.jsonl")
    constant = tmp_path / "constant.py"
    constant.write_text("def same(completions, **columns):\n    return [1.0] * len(completions)\n")
    tied = configs.merge(config.model_dump(), {"reward": [{"type": "function", "path": f"{constant}:same"}]})
    with pytest.raises(UserError, match="no pair was made"):
        make_pairs(configs.build(tied), tmp_path / "pairs.jsonl")
    assert not (tmp_path / "pairs.jsonl").exists()
