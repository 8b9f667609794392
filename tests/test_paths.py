"""Paths that begin with ~/: in every key of a recipe and in every word of a command line."""

from __future__ import annotations

import json

import pytest
import yaml

from command import dualign as command
from dualign.annotate.settings import Endpoint
from dualign.config import build, load
from dualign.paths import argument_at_home, at_home
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


@pytest.mark.parametrize(("word", "read"), [
    ("run.dir=~/x", "run.dir=HOME/x"), ("--out=~/x.json", "--out=HOME/x.json"), ("~/r.yaml", "HOME/r.yaml"),
    ("data.eval=~", "data.eval=~"), ("say a=~/b", "say a=~/b"), ("train.lr=1e-5", "train.lr=1e-5"),
])  # fmt: skip
def test_words_of_a_command_line(word, read, home):
    assert argument_at_home(word) == read.replace("HOME", str(home))


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
