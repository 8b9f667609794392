"""verify, replay and what-if on a finished run, and on what can befall its folder."""

import json
import math
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import dualign
from command import dualign as command
from dualign.algos.dar import DAR
from dualign.config import load
from dualign.run.folder import Run
from dualign.run.replay import again, cosine, stored, what_if
from runs_common import reward_file, tree, vowels, write_prompts


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar", "beta": 0.3, "w_clip": 5.0})
    config["run"]["checkpoints"] = 3
    config["reward"] = [reward_file()]
    dualign.train(config, quiet=True)
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def test_a_sound_run_is_sound(run):
    said = command("verify", run)
    assert said.code == 0 and "every file is what was written" in said.out and "not finished" not in said.out


def test_no_run_is_said_to_be_none(tmp_path):
    said = command("verify", tmp_path)
    assert said.code == 2 and "no run here" in said.err


FILES = ["config.yaml", "run.json", "metrics.jsonl", "summary.json", "manifest", "batches/000001.parquet",
         "evaluations/000003.parquet", "checkpoints/000003/state.json", "checkpoints/000003/train.safetensors",
         "checkpoints/000003/model.safetensors", "checkpoints/000001/model.safetensors"]  # fmt: skip


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["bit", "cut", "gone", "empty"])
def test_any_damage_is_found_and_the_file_named(name, how, run):
    path = run / name
    data = bytearray(path.read_bytes())
    if how == "gone":
        path.unlink()
    elif how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        data[len(data) // 2] ^= 4
        path.write_bytes(data)
    said = command("verify", run)
    if (name, how) == ("config.yaml", "gone"):
        assert said.code == 2 and "config.yaml" in said.err
        return
    if (name, how) == ("summary.json", "gone"):  # its record is the last: a kill just before it came looks the same
        assert said.code == 0 and "about to be written" in said.out
        return
    assert said.code == 1, said.text
    assert "damaged" in said.out and "Traceback" not in said.text
    if name != "manifest":
        assert name.split("/")[-1] in said.out


def test_a_batch_that_is_not_its_metrics_is_found_even_with_a_fresh_hash(run):
    """Someone who rewrites a reward and its record has still to explain the metrics."""
    path, opened = run / "batches/000001.parquet", Run.open(run)
    table = pq.read_table(path)
    rewards = table["reward"].to_pylist()
    rewards[3] += 1.0
    at = table.column_names.index("reward")
    opened._write_table(path, table.set_column(at, "reward", pa.array(rewards)))
    said = command("verify", run)
    assert said.code == 1 and "reward is" in said.out and "in metrics.jsonl" in said.out
    again = command("replay", run)
    assert (
        again.code == 1
        and "batch    1  16 rows  different" in again.out
        and "batch    0  16 rows  identical" in again.out
    )


def test_damage_is_never_trained_on(run):
    """Resume reads what it goes on from only as it was written."""
    (run / "checkpoints/000003/optimizer.safetensors").write_bytes(b"x" * 100)
    said = command("resume", run, "train.online_batches=4")
    assert said.code == 2 and "optimizer.safetensors: damaged" in said.err and "Delete" in said.err


def test_a_configuration_changed_by_hand_is_refused(run):
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.001", "lr: 0.002"))
    said = command("resume", run)
    assert said.code == 2 and "config.yaml" in said.err and "overrides" in said.err


SETTLED = ["train.lr=1", "algo.beta=2", "rollout.k=8", "run.seed=1", "data.train=x", "model.name=y"]


@pytest.mark.parametrize("override", SETTLED)
def test_what_is_settled_cannot_change_on_resume(override, run):
    said = command("resume", run, override)
    key = override.partition("=")[0]
    assert said.code == 2 and f"{key} cannot change on resume" in said.err and "train.online_batches" in said.err


def test_replay_gives_every_bit(run):
    said = command("replay", run)
    assert said.code == 0
    assert said.out.count("identical") == 3


def test_what_if_of_the_same_settings_changes_nothing(run):
    said = command("what-if", run, "beta=0.3", "algo.w_clip=5.0")
    assert said.code == 0 and said.out.count("direction +1.0000") == 4


def test_what_if_is_what_a_run_with_those_settings_would_have_stored(run):
    algo = load(run / "config.yaml").algo
    other = DAR(alpha=0.5, beta=0.1, w_clip=2.0)
    for b in stored(Run.open(run)):
        effect = what_if(b, algo, other)
        weight = again(b, other).batch["weight"].double()
        assert effect.other_stats["clip_rate"] == pytest.approx((weight >= 2.0 - 1e-6).double().mean())
        assert effect.other_stats["ess"] == pytest.approx(float(weight.sum() ** 2 / (weight**2).sum() / len(weight)))
        # under DAR every token of a row is pushed by its weight: cosine over rows, each counted by its tokens
        lengths = b.batch.mask_NT.sum(-1).double()
        old = b.batch["weight"].double()
        expected = (lengths * old * weight).sum() / ((lengths * old**2).sum() * (lengths * weight**2).sum()).sqrt()
        assert effect.cosine == pytest.approx(float(expected), abs=1e-6)


def test_what_if_is_one_document_for_programs(run):
    said = command("what-if", run, "beta=0.1", "--gradients", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    algo = load(run / "config.yaml").algo
    effects = [what_if(b, algo, algo.model_copy(update={"beta": 0.1})) for b in stored(Run.open(run))]
    assert [(each["batch"], each["stored"]["ess"], each["what_if"]["ess"]) for each in told["batches"]] == [
        (e.step, e.stats["ess"], e.other_stats["ess"]) for e in effects
    ]
    assert told["settings"] == ["beta=0.1"] and -1 <= told["direction"] < 1 and "0" in told["gradients"]
    for name in ("stored", "what_if"):
        assert len(told["weights"][name]) == len(told["weights"]["edges"])
        assert sum(told["weights"][name]) == pytest.approx(1)


def test_what_if_names_what_is_missing(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar", "alpha": 0.0}, online_batches=1)
    dualign.train(config, reward=vowels, quiet=True)
    said = command("what-if", tmp_path / "run", "alpha=0.5")
    assert said.code == 2 and "log π_0" in said.err


@pytest.mark.parametrize("setting", ["gamma=1", "beta=-1", "beta", "alpha=two", "name=nothing"])
def test_what_if_refuses_what_the_algorithm_does_not_have(setting, run):
    said = command("what-if", run, setting)
    assert said.code == 2 and "Traceback" not in said.text


def test_true_gradients(run):
    """The same settings push exactly the same way; others do not."""
    same = command("what-if", run, "beta=0.3", "--gradients")
    other = command("what-if", run, "beta=0.01", "alpha=0.9", "--gradients")
    assert same.code == other.code == 0
    line = next(line for line in same.out.splitlines() if "cosine of the gradients" in line)
    assert float(line.rsplit(" ", 1)[1]) == pytest.approx(1.0, abs=1e-4)
    values = [float(x.rsplit(" ", 1)[1]) for x in other.out.splitlines() if "cosine of the gradients" in x]
    assert len(values) == 3 and all(v < 0.999 for v in values)


def test_cosine():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    assert cosine([a], [b]) == pytest.approx(math.sqrt(0.5))
    assert cosine([a, b], [2 * a, 2 * b]) == pytest.approx(1.0)
    assert math.isnan(cosine([a], [0 * a]))


def test_a_torn_line_of_metrics_is_unfinished_not_damaged(run):
    records = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(records + b'{"step": 3, "rew')
    said = command("verify", run)
    assert said.code == 0 and "cut off" in said.out
    assert [r["step"] for r in Run.open(run).metrics()] == [0, 1, 2]
    assert json.loads(records.splitlines()[0])["step"] == 0
