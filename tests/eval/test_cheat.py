"""The verdict names what went wrong and since when, and is silent about what did not."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import dualign
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.eval.cheat import _rose, independent, texts, verdict
from dualign.training.heldout import kl_name
from runs_common import tree, vowels, write_pairs, write_prompts


def batch(step, **changes):
    fine = {"reward_sd": 0.3 * step, "reward_se": 0.1, "second_sd": 0.02 * step, "second_se": 0.1, "kl": 1.0 * step,
            "missing_eos": 0.1, "length": 40.0, "distinct_2": 0.8, "repetition": 0.02, "refusals": 0.1,
            "same_opening": 0.05, "agreement": 0.4}  # fmt: skip
    return {"batch": step, **fine, **changes}


def test_a_clean_run_is_not_accused():
    found = verdict([batch(i) for i in range(10)])
    assert found["from_batch"] is None and not found["signs"]
    assert "no sign of overoptimisation" in found["verdict"] and "rose 2.7 sd" in found["verdict"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"second_sd": -1.0}, "independent reward"),
        ({"refusals": 0.9}, "refuse"),
        ({"same_opening": 0.7}, "begin alike"),
        ({"distinct_2": 0.3}, "word pairs"),
        ({"repetition": 0.5}, "repeat"),
    ],
)
def test_each_grave_sign_names_its_batch(change, word):
    found = verdict([batch(i, **(change if i >= 6 else {})) for i in range(10)])
    assert found["from_batch"] == 6 and word in found["verdict"]
    assert "likely overoptimised from batch 6" in found["verdict"]


def test_one_odd_batch_is_noise_and_a_sign_that_went_away_is_none():
    assert verdict([batch(i, **({"refusals": 0.9} if i == 3 else {})) for i in range(10)])["from_batch"] is None
    assert (
        verdict([batch(i, **({"refusals": 0.9} if i in (2, 3, 4, 5) else {})) for i in range(10)])["from_batch"] is None
    )
    late = verdict([batch(i, **({"refusals": 0.9} if i in (1, 6, 7, 8, 9) else {})) for i in range(10)])
    assert late["from_batch"] == 6


def test_length_and_eos_are_told_but_are_no_proof():
    found = verdict([batch(i, **({"length": 90.0, "missing_eos": 0.9} if i >= 4 else {})) for i in range(10)])
    assert found["from_batch"] is None and len(found["signs"]) == 2


def test_a_second_reward_that_wants_the_opposite_proves_nothing():
    found = verdict([batch(i, second_sd=-0.3 * i, agreement=-0.6) for i in range(10)])
    assert found["from_batch"] is None and "opposes" in found["signs"][-1]
    assert "independent" not in found["verdict"]


def test_getting_worse_without_reward_is_not_called_overoptimised():
    found = verdict([batch(i, reward_sd=-0.2 * i, repetition=0.6 if i >= 5 else 0.0) for i in range(10)])
    assert "worse from batch 5, and the reward has not clearly risen" in found["verdict"]
    assert "overoptimised" not in found["verdict"]


def test_what_texts_look_like():
    apology = "I'm sorry, but I can't help with that request."
    found = texts([apology] * 3 + ["the cat sat on a mat"])
    assert found["refusals"] == 0.75 and found["same_opening"] == 0.75
    assert texts(["a b c d a b c d a b c d"])["repetition"] == pytest.approx(5 / 9)
    assert texts(["a b c d", "e f g h"])["distinct_2"] == 1.0
    assert texts(["I will go. You can help me."])["refusals"] == 0
    assert texts(["", "x"])["distinct_2"] == 0


def test_what_the_distance_is_called_where_a_run_of_before_does_not_say():
    assert "at log(π/π_0) of its samples of 9.0 nats" in verdict([batch(i) for i in range(10)])["verdict"]
    named = verdict([batch(i, kl_name="KL to π_0") for i in range(10)])["verdict"]
    assert "at KL to π_0 of 9.0 nats" in named


def test_a_run_is_traced_batch_by_batch(tiny, tmp_path):
    config = tree(
        tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar", "beta": 0.3}, online_batches=6, lr=3e-3
    )
    temperature = config["rollout"]["temperature"] = 0.9
    run = dualign.train(config, reward=vowels, quiet=True)
    second = f"{__file__}:negative_length"
    done = CliRunner().invoke(application(), ["eval", "cheat", str(run.folder), "--second", second])
    assert done.exit_code == 0, done.output
    (file,) = (run.folder / "eval").glob("cheat-test_cheat-py-negative_length-*.json")
    result = json.loads(file.read_text())
    table = result["batches"]
    assert [row["batch"] for row in table] == list(range(6))
    assert table[0]["reward_sd"] == table[0]["second_sd"] == 0 and table[0]["kl"] == pytest.approx(0, abs=1e-4)
    kl = kl_name({"temperature": temperature, "top_p": 1.0})
    assert f" at {kl} of " in result["verdict"] and kl in done.output and "KL to" not in done.output
    assert table[-1]["kl"] > table[0]["kl"] and result["verdict"] in done.output.replace("\n", " ")
    assert independent(run.folder) == "builtin:helpful"
    both = yaml.safe_load((run.folder / "config.yaml").read_text())
    both["reward"] = [{"type": "head", "path": path} for path in ("builtin:helpful", "builtin:harmless")]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(both))
    with pytest.raises(UserError, match="trained on both built-in heads"):
        independent(tmp_path)
    short = tmp_path / "short.json"
    options = ["--second", second, "--until", "4", "--out", str(short)]
    CliRunner().invoke(application(), ["eval", "cheat", str(run.folder), *options])
    assert json.loads(short.read_text())["batches"] == table[:4]


def negative_length(completions, **columns):
    return [-float(len(c[0]["content"] if isinstance(c, list) else c)) for c in completions]


def test_the_noise_of_the_first_batch_counts_too():
    """A rise of 0.25 sd with standard errors of 0.2 in every batch, the first included, is none (0.23 of it is noise)."""
    rows = [{"reward_sd": 0.0, "reward_se": 0.2}] + [{"reward_sd": 0.25, "reward_se": 0.2}] * 3
    assert not _rose(rows)
    assert _rose([rows[0] | {"reward_se": 0.0}, *rows[1:]])


def test_a_fixed_set_says_nothing_about_cheating(tiny, tmp_path):
    config = tree(tiny, write_pairs(tmp_path), tmp_path / "run", {"name": "offline_dpo"})
    dualign.train(config, reward=vowels, quiet=True)
    said = CliRunner().invoke(application(), ["eval", "cheat", str(tmp_path / "run")])
    assert said.exit_code != 0 and "fixed set" in str(said.exception)


def nothing(completions, **columns):
    return [0.0 for c in completions]


def by_tokens(completions, completion_ids, **columns):
    return [float(len(ids)) for ids in completion_ids]


def test_the_penalty_for_a_missing_eos_is_no_reward(tiny, tmp_path):
    """A reward that gives every answer the same has not risen, however many fewer are cut off."""
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    generation = json.loads((model / "generation_config.json").read_text())
    often = [generation["eos_token_id"], *range(64)]  # one token in four ends an answer
    (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": often}))
    config = tree(model, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=2, lr=1e-2)
    config["rollout"] |= {"missing_eos_penalty": 5.0, "max_new_tokens": 3}
    run = dualign.train(config, reward=nothing, quiet=True)
    assert run.read_batch(0).batch.reward_N.std() > 0, "in training, those that were cut off are worth less"
    out = tmp_path / "cheat.json"
    options = ["--second", f"{__file__}:by_tokens", "--out", str(out)]
    CliRunner().invoke(application(), ["eval", "cheat", str(run.folder), *options], catch_exceptions=False)
    result = json.loads(out.read_text())
    assert [row["reward_sd"] for row in result["batches"]] == [0.0, 0.0]
    assert "reward stayed" in result["verdict"] and 0 < result["batches"][0]["missing_eos"] < 1
