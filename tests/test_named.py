"""A run's folder where a model is asked for."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import dualign
from command import dualign as command
from dualign.common.errors import UserError
from dualign.run.folder import Run
from dualign.run.named import checkpoint_of
from runs_common import reward_file, tree, weights, write_prompts


@pytest.fixture(scope="module")
def first(tiny, tmp_path_factory) -> Path:
    """A run of three online batches, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("first")
    config = settings(tiny, folder / "first")
    config["run"]["checkpoints"] = 3
    dualign.train(config, quiet=True)
    return folder / "first"


def settings(model, run: Path, **train):
    config = tree(model, write_prompts(run.parent), run, {"name": "dar"}, **train)
    return config | {"reward": [reward_file()]}


def test_a_run_stands_for_its_checkpoints(first, tmp_path):
    assert checkpoint_of(str(first)) == str(first / "checkpoints/000003")
    assert checkpoint_of(f"{first}@2") == str(first / "checkpoints/000002")
    for name in ("smollm2-135m-instruct", "org/name", str(first / "checkpoints/000002"), f"{tmp_path}@3", "@", "a@b"):
        assert checkpoint_of(name) == name
    for which, said in ((9, r"no checkpoint 9; there are 1, 2, 3"), ("best", "no witness"), ("last", r"@best .*@N")):
        with pytest.raises(UserError, match=said):
            checkpoint_of(f"{first}@{which}")


def test_a_run_trains_from_a_run_and_resumes_though_that_one_goes_on(first, tmp_path):
    config = settings(first, tmp_path / "second", online_batches=2)
    config["model"]["reference"] = f"{first}@1"
    dualign.train(config, quiet=True)
    kept = Run.open(tmp_path / "second").config.model
    assert kept.name == str(first / "checkpoints/000003") and kept.reference == str(first / "checkpoints/000001")
    by_folder = settings(kept.name, tmp_path / "same", online_batches=3)
    by_folder["model"]["reference"] = kept.reference
    dualign.train(by_folder, quiet=True)
    assert command("resume", first, "train.online_batches=4").code == 0
    assert checkpoint_of(str(first)) == str(first / "checkpoints/000004")
    config["train"]["online_batches"] = 3
    dualign.train(config, quiet=True, resume=True)  # it names the run still
    a, b = weights(tmp_path / "second"), weights(tmp_path / "same")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert command("verify", tmp_path / "second").code == 0
    moved = command("resume", tmp_path / "second", f"model.name={first}@1")
    assert moved.code == 2 and "model.name cannot change" in moved.err


def test_what_a_run_is_made_from_stays_and_may_not_change(first, tmp_path):
    """`run.keep_last` spares it; who takes it away all the same is told what is gone when the other run is resumed."""
    one, two = shutil.copytree(first, tmp_path / "one"), tmp_path / "two"
    dualign.train(settings(f"{one}@2", two, online_batches=1), quiet=True)
    assert command("resume", one, "train.online_batches=5", "run.keep_last=1").code == 0
    assert [path.name for path in Run.open(one).saved()] == ["000002", "000005"]
    base = one / "checkpoints/000002"
    (one / "checkpoints/000005/model.safetensors").replace(base / "model.safetensors")  # made anew, by other settings
    longer = "train.online_batches=2"
    other = command("resume", two, longer)
    assert other.code == 2 and "model.name: model.safetensors (sha256" in other.err and "has changed" in other.err
    shutil.rmtree(base)
    gone = command("resume", two, longer)
    assert gone.code == 2 and f"model.name: {base} is gone" in gone.err and "Traceback" not in gone.text
    assert [path.name for path in Run.open(two).saved()] == ["000001"]
    shutil.copytree(first / "checkpoints/000002", tmp_path / "copy")
    assert command("resume", two, longer, f"model.name={tmp_path / 'copy'}").code == 0


def test_commands_take_a_run_as_a_model(first, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(settings(f"{first}@2", tmp_path / "run")))
    assert command("train", recipe, "--dry-run").code == 0
    for name, out in ((f"{first}@2", "named"), (first / "checkpoints/000002", "folder")):
        said = command("sample", name, tmp_path / "prompts.jsonl", "--max-new-tokens", 4, "--out", tmp_path / out)
        assert said.code == 0, said.err
    assert (tmp_path / "named").read_text() == (tmp_path / "folder").read_text()
    asked = ("--prompts", tmp_path / "prompts.jsonl", "--max-new-tokens", 4)
    judge = f"{Path(__file__).parent}/support/runs_common.py:vowels"
    out = tmp_path / "r.json"
    said = command("eval", "reward", f"{first}@1", f"{first}@2", "--judge", judge, *asked, "--out", out)
    assert said.code == 0, said.err
    assert [system["source"] for system in json.loads(out.read_text())["systems"]] == [f"{first}@1", f"{first}@2"]
    pairs = command("pairs", recipe, "--out", tmp_path / "pairs.jsonl")
    assert pairs.code == 0, pairs.err
