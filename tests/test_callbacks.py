"""Callbacks hear of a run and change nothing in it; run.json says of which commit it was begun."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

import dualign
from dualign.common.git import git_state
from runs_common import tree, vowels, weights, write_prompts


class Heard(dualign.Callback):
    def __init__(self, stop_at=None):
        self.batches, self.evaluations, self.ends, self.stop_at = [], [], [], stop_at

    def on_batch(self, record):
        self.batches.append(record)
        if record["step"] == self.stop_at:
            raise dualign.StopRun("enough")

    def on_evaluation(self, done, means):
        self.evaluations.append((done, means["reward"]))

    def on_end(self, summary):
        self.ends.append(summary)


def test_callbacks_hear_and_stop_and_the_resumed_run_is_the_same(tiny, tmp_path):
    prompts = write_prompts(tmp_path)
    heard = Heard()
    run = dualign.train(tree(tiny, prompts, tmp_path / "a", {"name": "dar"}), vowels, quiet=True, callbacks=[heard])
    assert heard.batches == run.metrics() and heard.ends == [run.summary]
    assert heard.evaluations == [(each.done, each.stats["reward"]) for each in run.evaluations()]
    stopped = tree(tiny, prompts, tmp_path / "b", {"name": "dar"})
    with pytest.raises(dualign.StopRun, match="enough"):
        dualign.train(stopped, vowels, quiet=True, callbacks=[Heard(stop_at=1)])
    dualign.train(stopped, vowels, quiet=True, resume=True)
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_says_which_commit_it_was_begun_in(tiny, tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init", "-q", "-b", "trunk")
    (tmp_path / "reward.py").write_text("x = 1\n")
    git("add", "reward.py")
    git("commit", "-q", "-m", "first")
    git("remote", "add", "origin", "https://me:ghp_secret@example.org/r.git")
    (tmp_path / "reward.py").write_text("x = 2\n")
    monkeypatch.chdir(tmp_path)
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    dualign.train(config, vowels, quiet=True)
    text = (tmp_path / "run/run.json").read_text()
    found = json.loads(text)
    assert found["git"]["branch"] == "trunk" and found["git"]["changed"] == ["reward.py"]
    assert len(found["git"]["commit"]) == 40 and "ghp_secret" not in text and found["python"].startswith("3.")
