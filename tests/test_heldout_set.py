"""Systems on a fixed set show loss, margin and accuracy on held-out rows of one, and no reward."""

import json
import shutil

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM

import dualign
from dualign.algos import ALGORITHMS
from dualign.common.errors import StopRun, UserError
from dualign.config import build
from dualign.eval.outputs import Generation, points
from dualign.eval.report import write_report
from dualign.run.folder import Run
from dualign.training.heldout import key_of
from dualign.training.plan import print_plan
from dualign.training.view import View, verdict, warnings_of
from runs_common import metrics, tree, vowels, write_demonstrations, write_pairs, write_prompts


def config_of(tiny, folder, algo, prompts=24, **train):
    pairs = ALGORITHMS[algo["name"]].source == "pairs"
    data = (write_pairs if pairs else write_demonstrations)(folder, 24)
    config = tree(tiny, data, folder / "run", algo, **train)
    config["eval"] = {"prompts": prompts, "every": 2}
    return config


def log_probs(model, rows):
    """Of every completion, per token."""
    found = []
    for r in (row.rollout for row in rows):
        ids = torch.tensor([[*r.prompt_ids, *r.completion_ids]])
        with torch.no_grad():
            logp = model(ids).logits.double().log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
        found.append(logp[len(r.prompt_ids) - 1 :])
    return found


@pytest.mark.parametrize("name", ["offline_dpo", "simpo", "sft"])
def test_the_numbers_are_the_models(name, tiny, tmp_path, capsys):
    """Of the checkpoint, by transformers alone."""
    run = dualign.train(config_of(tiny, tmp_path, {"name": name}))
    said = " ".join(capsys.readouterr().out.split())
    rows, stats = run.read_evaluation(3)
    first, last = (AutoModelForCausalLM.from_pretrained(m).eval() for m in (tiny, run.saved()[-1]))
    logp, ref = log_probs(last, rows), log_probs(first, rows)
    if name == "sft":
        assert stats["loss"] == pytest.approx(-float(torch.cat(logp).mean()), rel=1e-4)
        assert stats["data"] == "demonstrations" and stats["margin"] is None and "accuracy" not in said
    else:
        score = [x.mean() if name == "simpo" else x.sum() - y.sum() for x, y in zip(logp, ref, strict=True)]
        h = torch.stack([won - lost for won, lost in zip(score[::2], score[1::2], strict=True)])
        beta, gamma = (2.0, 1.6) if name == "simpo" else (0.1, 0.0)
        assert stats["loss"] == pytest.approx(float(-logsigmoid(beta * h - gamma).mean()), rel=1e-3)
        assert stats["margin"] == pytest.approx(float((beta * h).mean()), rel=1e-3, abs=1e-4)
        assert stats["accuracy"] == pytest.approx(float((h > 0).double().mean()))
        assert stats["accuracy_low"] < stats["accuracy"] or stats["accuracy"] == 0
        assert [r.label.parts.keys() for r in rows[:2]] == [{"log_prob", "loss", "margin", "accuracy"}, {"log_prob"}]
        margins = [r.label.parts["margin"] for r in rows[::2]]
        assert np.std(margins, ddof=1) * 2.0687 / 24**0.5 == pytest.approx(stats["margin_ci"], rel=1e-4)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert stats["rows"] == summary["changes"]["loss"]["n"] == 24 and "gain" not in summary
    if name != "sft":  # whose mean is over tokens, and the paired one over demonstrations
        change = summary["after"]["loss"] - summary["before"]["loss"]
        assert summary["changes"]["loss"]["change"] == pytest.approx(change)
    (line,) = [line for line in verdict(summary) if "held-out loss" in line]
    assert line in said and line.endswith("better"), "on rows that it was trained on, too"
    assert all("reward" not in record and math_is_fine(record) for record in metrics(run.folder))
    assert sorted(p.name for p in run.evaluations_dir.glob("*.parquet")) == [f"{i:06d}.parquet" for i in (0, 2, 3)]


def math_is_fine(record):
    return np.isfinite(record["loss"]) and record.get("reward_std") is None


def test_before_training_no_pair_is_decided(tiny, tmp_path):
    """π_θ is π_0: every margin is exactly 0, which is neither right nor wrong."""
    run = dualign.train(config_of(tiny, tmp_path, {"name": "offline_dpo"}, online_batches=1), quiet=True)
    _, before = run.read_evaluation(0)
    assert (before["accuracy"], before["margin"], before["margin_ci"]) == (0.5, 0.0, None)
    assert before["loss"] == pytest.approx(np.log(2)) and before["loss_ci"] is None


def test_few_pairs_have_no_verdict_and_readers_know_what_they_are(tiny, tmp_path, capsys):
    config = config_of(tiny, tmp_path, {"name": "offline_dpo"}, prompts=6, online_batches=2)
    run = dualign.train(config, quiet=True)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert all("6 prompts are too few for a verdict" in line for line in verdict(summary)) and summary["changes"]
    with pytest.raises(UserError, match="evaluated on held-out pairs and sampled nothing"):
        points(str(run.folder), Generation(None, 8, 0.0, 1, 0, tmp_path / "outputs"))
    text = write_report([run.folder]).read_text(encoding="utf-8")
    assert 'id="figure-loss"' in text and 'id="figure-accuracy"' in text and 'id="figure-reward"' not in text
    assert "held-out accuracy" in text


def test_a_run_that_goes_on_does_not_evaluate_again(tiny, tmp_path, monkeypatch):
    config = config_of(tiny, tmp_path, {"name": "simpo"}, prompts=8)
    straight = dualign.train({**config, "run": {**config["run"], "dir": str(tmp_path / "straight")}}, quiet=True)
    said = []
    evaluation = View.evaluation

    def stopping(self, result):
        evaluation(self, result)
        said.append(result.batches)
        if len(said) == 2:
            raise StopRun("stopped")

    monkeypatch.setattr(View, "evaluation", stopping)
    with pytest.raises(StopRun):
        dualign.train(config, quiet=True)
    run = dualign.train(config, resume=True, quiet=True)
    assert said == [0, 2, 3]
    one, two = (json.loads((r.folder / "summary.json").read_text())["changes"] for r in (straight, run))
    assert one == two


def test_what_is_held_out_must_be_of_the_systems_kind(tiny, tmp_path):
    config = config_of(tiny, tmp_path, {"name": "offline_dpo"})
    for data, told in (
        (write_prompts(tmp_path), r"evaluated on held-out pairs: .*or set data\.eval: null"),
        (write_demonstrations(tmp_path), r"data\.eval: offline_dpo needs preference pairs"),
    ):
        config["data"]["eval"] = str(data)
        with pytest.raises(UserError, match=told):
            dualign.train(config, quiet=True)
        assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="needs preference pairs"):
        print_plan(build(config | {"data": config["data"] | {"max_prompt_tokens": 100}}))


def test_with_a_reward_answers_to_held_out_prompts_are_judged_as_before(tiny, tmp_path):
    config = config_of(tiny, tmp_path, {"name": "offline_dpo"}, prompts=4, online_batches=1)
    run = dualign.train(config, reward=vowels, quiet=True)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert "gain_sd" in summary and "changes" not in summary and summary["after"]["prompts"] == 4


def test_a_run_begun_without_evaluations_goes_on_without(tiny, tmp_path, capsys):
    """As one that a version before began, which evaluated nothing without a reward."""
    config = config_of(tiny, tmp_path, {"name": "sft"})
    run = dualign.train(config, quiet=True)
    shutil.rmtree(run.evaluations_dir)
    run.evaluations_dir.mkdir()
    kept = [line for line in run.manifest.path.read_text().splitlines(True) if "evaluations/" not in line]
    run.manifest.path.write_text("".join(kept))
    (run.folder / "summary.json").unlink()
    capsys.readouterr()
    dualign.train(config, resume=True)
    assert "began without evaluations" in " ".join(capsys.readouterr().out.split())
    assert "before" not in json.loads((run.folder / "summary.json").read_text())


def test_a_first_evaluation_that_was_deleted_is_made_again(tiny, tmp_path):
    """As `dualign verify` says of a damaged one; past its checkpoint only with the checkpoints gone too."""
    config = config_of(tiny, tmp_path, {"name": "sft"})
    run = dualign.train(config, quiet=True)
    before = json.loads((run.folder / "summary.json").read_text())
    run.evaluation_path(0).unlink()
    (run.folder / "summary.json").unlink()
    with pytest.raises(UserError, match="training is past it"):
        dualign.train(config, resume=True, quiet=True)
    for checkpoint in run.saved():
        shutil.rmtree(checkpoint)
    dualign.train(config, resume=True, quiet=True)
    after = json.loads((run.folder / "summary.json").read_text())
    assert after["changes"] == before["changes"] and after["before"]["loss"] == before["before"]["loss"]


def test_held_out_rows_are_drawn_from_those_that_fit(tiny, tmp_path):
    rows = [
        {"id": f"d{i}", "prompt": f"say {'x' * (60 if i % 2 else 3)} {i}: ", "completion": "aei"} for i in range(20)
    ]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tree(tiny, path, tmp_path / "run", {"name": "sft"}, online_batches=1, online_batch=4, update_size=4)
    config["data"]["max_prompt_tokens"] = 30
    config["eval"] = {"prompts": 7}
    run = dualign.train(config, quiet=True)
    kept, stats = Run(run.folder).read_evaluation(0)
    assert stats["rows"] == 7 and len({key_of(row) for row in kept}) == 7
    assert all(int(row.rollout.prompt.id[1:]) % 2 == 0 for row in kept)


def test_a_batch_of_a_fixed_set_is_not_warned_of_as_a_reward():
    record = {"truncated": 0.0, "absent": 0, "loss": 0.7}
    assert warnings_of(record, ALGORITHMS["offline_dpo"]()) == []
