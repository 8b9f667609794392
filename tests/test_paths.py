"""Paths that begin with ~/: in every key of a recipe and in every word of a command line that may hold a path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from command import dualign as command
from dualign.annotate.endpoints import Endpoint
from dualign.common.paths import at_home
from dualign.config import build, load
from dualign.eval.asking import Asking
from runs_common import reward_file, tree, write_prompts


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize(("text", "path"), [
    ("~/a/b", "HOME/a/b"), ("~/r.py:f", "HOME/r.py:f"), ("~", "~"), ("a/~/b", "a/~/b"), ("~ hello/you", "~ hello/you"),
    ("./~/a", "./~/a"), ("~nobody-of-this-name/a", "~nobody-of-this-name/a"),
])  # fmt: skip
def test_home_is_where_a_path_begins_with_it(text, path, home):
    assert at_home(text) == path.replace("HOME", str(home))


@pytest.mark.parametrize("text", ["~/ is the user's folder: be terse", "~/x"])
def test_texts_that_are_no_paths_stay_as_they_are(text):
    config = build({
        "model": {"name": "m"}, "train": {"online_batches": 1}, "data": {"train": "p.jsonl", "system_prompt": text},
        "reward": [{"type": "function", "path": "r.py:f", "name": text}],
    })  # fmt: skip
    assert config.data.system_prompt == text and config.reward[0].name == text


@pytest.mark.parametrize("written", [["--system-prompt=~/ be terse"], ["--system-prompt", "~/ be terse"]])
def test_texts_of_a_command_line_stay_as_they_are(written, monkeypatch):
    given = []
    monkeypatch.setattr("dualign.rollout.sample.sample_to", lambda *arguments: given.extend(arguments))
    assert command("sample", "~/my model", "~/ means what?", *written, "--out", "~/my answers.jsonl").code == 0
    home = Path.home()
    assert given[:3] == [str(home / "my model"), "~/ means what?", home / "my answers.jsonl"]
    assert given[-1] == "~/ be terse"


@pytest.mark.parametrize("kind", ["winrate", "reward"])
def test_texts_and_paths_of_an_evaluation(kind, monkeypatch):
    given = []
    name = {"winrate": "win_rate", "reward": "mean_reward"}[kind]
    monkeypatch.setattr(f"dualign.eval.evaluate.{name}", lambda *a: given.extend(a))
    monkeypatch.setattr("dualign.eval.show.show", lambda *a: None)
    said = command("eval", kind, "~/a run", "~/b", "--judge=~/j.py:f", "--prompts", "~/p.jsonl", "--system-prompt",
                   "~/ be terse", "--out=~/x.json")  # fmt: skip
    assert said.code == 0, said.text
    home = Path.home()
    assert given[:2] == [[str(home / "a run"), str(home / "b")], f"{home}/j.py:f"]
    (asking,) = (x for x in given if isinstance(x, Asking))
    assert (asking.prompts, asking.system_prompt) == (str(home / "p.jsonl"), "~/ be terse")
    assert home / "x.json" in given


def test_every_key_of_a_recipe_that_can_hold_a_path(home):
    config = build({
        "model": {"name": "~/m", "chat_template": "~/t.jinja"},
        "data": {"train": "~/p.jsonl", "eval": "~/e.jsonl"},
        "reward": [
            {"type": "function", "path": "~/r.py:f"}, {"type": "head", "path": "~/h.safetensors"},
            {"type": "classifier", "model": "~/c"},
            {"type": "judge", "rubric": "~/r.yaml", "base_url": "http://x/v1", "model": "m", "cache": "~/c.sqlite"},
        ],
        "train": {"online_batches": 1},
        "run": {"dir": "~/runs/a"},
    })  # fmt: skip
    text = config.model_dump_json()
    assert "~" not in text and text.count(str(home)) == 10


def test_a_run_in_the_users_folder(home, tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "unused", {"name": "dar"}, online_batches=1)
    config["data"] = {"train": "~/prompts.jsonl"}
    (tmp_path / "prompts.jsonl").rename(home / "prompts.jsonl")
    (home / "base.yaml").write_text(yaml.safe_dump(config | {"reward": [reward_file()]}))
    (tmp_path / "recipe.yaml").write_text("base: ~/base.yaml\n")
    assert load("~/base.yaml") == load(home / "base.yaml")
    assert command("train", "recipe.yaml", "run.dir=~/runs/a").code == 0
    assert (home / "runs" / "a" / "summary.json").is_file() and not (tmp_path / "~").exists()
    assert command("verify", "~/runs/a").code == 0


def test_a_file_is_written_there(home, tmp_path):
    rows = [{"prompt": "say a", "completion": "a"}, {"prompt": "say b", "completion": "b"}]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command("judge", "~/rows.jsonl", "--rubric", "~/none.yaml", "--base-url", "http://x/v1", "--model", "m",
                   "--out=~/out.jsonl", "--set", "cache=~/c.sqlite")  # fmt: skip
    assert said.code == 2 and str(home / "none.yaml") in said.text
    assert Endpoint(base_url="http://x/v1", model="m", cache="~/c.sqlite").cache == str(home / "c.sqlite")


@pytest.mark.parametrize("key", ["model.name", "model.reference", "data.train", "rollout.engine", "reward.0.path"])
def test_the_folder_of_nobody_is_a_sentence(key, tiny, tmp_path):
    made = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(made))
    said = command("train", tmp_path / "r.yaml", f"{key}=~nobody-of-this-name/x.py:f")
    assert said.code == 2 and "~nobody-of-this-name" in said.err
