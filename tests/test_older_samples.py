"""Completions of an older policy: earlier batches that are trained on again, and batches that are sampled ahead."""

from __future__ import annotations

import math
import shutil
import signal
import threading
import time

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import dualign
from dualign.annotate import BatchSession, Item
from dualign.annotate.function import FunctionAnnotator
from dualign.annotate.remembered import Remembered
from dualign.annotate.together import Together
from dualign.cli import application
from dualign.common.errors import StopRun, UserError
from dualign.common.processes import Processes
from dualign.common.types import Label, Prompt
from dualign.config import build
from dualign.run.folder import Run
from dualign.run.journal import Book, Journal
from dualign.run.replay import stored
from dualign.run.verify import verify
from dualign.training.engine import Engine
from fault_server import FaultServer
from runs_common import metrics, tree, vowels, weights, write_prompts

DAR = {"name": "dar", "alpha": 0.1, "beta": 0.3}


def settings(tiny, folder, name="run", ahead=0, log_probs="recomputed", **train):
    found = tree(tiny, write_prompts(folder), folder / name, DAR, **{"online_batches": 4, **train})
    found["rollout"] |= {"ahead": ahead, "log_probs": log_probs}
    found["eval"] |= {"every": 2}
    return found


class Counted:
    """The share of vowels; counts the labels that it gives."""

    def __init__(self):
        self.given = 0

    def __call__(self, completions, **columns):
        self.given += len(completions)
        return vowels(completions)


def test_earlier_batches_are_trained_on_again_without_a_label(tiny, tmp_path):
    fresh, again = Counted(), Counted()
    dualign.train(settings(tiny, tmp_path, "fresh"), reward=fresh, quiet=True)
    run = dualign.train(settings(tiny, tmp_path, reuse=[1, 3]), reward=again, quiet=True)
    assert again.given == fresh.given
    names = sorted(path.name for path in (run.folder / "reused").iterdir())
    assert names == [f"{a:06d}-{b:06d}.parquet" for a, b in ((1, 0), (2, 1), (3, 0), (3, 2))]
    assert [run.reused(step) for step in range(4)] == [[], [0], [1], [2, 0]]
    assert [record.get("reused", 0) for record in metrics(run.folder)] == [0, 1, 1, 2]
    one, two = weights(tmp_path / "fresh"), weights(run.folder)
    assert any(not torch.equal(one[key], two[key]) for key in two)


def test_a_use_is_weighted_for_the_policy_of_now_by_that_which_sampled(tiny, tmp_path):
    """log w = α log π_0 + (1-α) log π_t - log μ + A/β: π_t is the policy of the use, A that of then."""
    run = dualign.train(settings(tiny, tmp_path, reuse=[2], lr=3e-3), reward=vowels, quiet=True)
    first, use = run.batch(1), run.read_reused(3, 1)
    was, now = first.batch, use.batch
    assert torch.equal(now.logp_behaviour_NT, was.logp_old_NT) and torch.equal(now.logp_ref_NT, was.logp_ref_NT)
    assert torch.equal(now["advantage"], was["advantage"])
    moved_N = now.seq_old_N - now.seq_behaviour_N
    assert moved_N.abs().max() > 0.01, "π_t has not moved, and the test shows nothing"
    log_w_N = 0.1 * now.seq_ref_N + 0.9 * now.seq_old_N - now.seq_behaviour_N + now["advantage"] / 0.3
    assert torch.allclose(now["weight"].log(), log_w_N.clamp(max=math.log(20)), atol=1e-4)
    assert metrics(run.folder)[3]["reused/log_ratio"] == pytest.approx(float(moved_N.abs().mean()), rel=1e-6)


def test_the_next_batch_is_of_the_policy_before_the_updates(tiny, tmp_path):
    """Where π_0 never moves, batch 1 is what batch 1 of a run that samples ahead is."""
    still = dualign.train(settings(tiny, tmp_path, "still", lr=1e-12), reward=vowels, quiet=True)
    run = dualign.train(settings(tiny, tmp_path, ahead=1, lr=3e-3), reward=vowels, quiet=True)
    texts = [[row.rollout.text for row in r.batch(1).rows] for r in (still, run)]
    assert texts[0] == texts[1]
    batch = run.batch(1).batch
    assert torch.allclose(batch.logp_behaviour_NT, batch.logp_ref_NT, atol=1e-5)
    assert (batch.seq_old_N - batch.seq_behaviour_N).abs().max() > 0.01
    log_w_N = 0.1 * batch.seq_ref_N + 0.9 * batch.seq_old_N - batch.seq_behaviour_N + batch["advantage"] / 0.3
    assert torch.allclose(batch["weight"].log(), log_w_N.clamp(max=math.log(20)), atol=1e-4)


def test_recorded_log_probs_are_those_of_the_policy_that_sampled(tiny, tmp_path):
    found = [
        dualign.train(settings(tiny, tmp_path, how, ahead=2, log_probs=how, reuse=[1]), reward=vowels, quiet=True)
        for how in ("recomputed", "recorded")
    ]
    one, two = (run.batch(3).batch for run in found)
    assert torch.allclose(one.logp_behaviour_NT, two.logp_behaviour_NT, atol=1e-3)
    assert torch.allclose(one.logp_old_NT, two.logp_old_NT, atol=1e-3)


class Late:
    """Gives no label of a batch before the next but `ahead` is sampled."""

    name = "late"

    def __init__(self, ahead: int, batches: int) -> None:
        self.ahead, self.batches, self.opened = ahead, batches, 0
        self.seen = [threading.Event() for _ in range(batches + ahead)]

    def open(self):
        number = self.opened
        self.opened += 1
        self.seen[number].set()

        def label(items):
            then = min(number + self.ahead, self.batches - 1)
            assert self.seen[then].wait(60), f"batch {then} was not sampled while batch {number} waited for its labels"
            return [Label(float(len(item.completion))) for item in items]

        return BatchSession(label)

    def close(self):
        pass


@pytest.mark.parametrize("ahead", [1, 2])
def test_labels_come_while_the_next_batch_is_sampled(ahead, tiny, tmp_path):
    late = Late(ahead, 4)
    config = settings(tiny, tmp_path, ahead=ahead)
    config["data"]["eval"] = None
    dualign.train(config, reward=late, quiet=True)
    assert late.opened == 4 and len(metrics(tmp_path / "run")) == 4


def test_labels_that_are_asked_for_together_stay_with_their_batch(tmp_path):
    """Several processes meet when a batch's turn comes: others have begun since."""
    journal = Journal()
    journal.begin(tmp_path / "0")
    session = Together(Remembered(FunctionAnnotator(vowels), "key", journal, whole=True), Processes()).open()
    session.add(Item(0, 0, Prompt("p", "x"), "aei"))
    journal.begin(tmp_path / "1")
    session.meet(lambda inner: inner.close())
    journal.end()
    assert session.close()[0].value is not None
    assert [list(Book(tmp_path / name).labels("key")) for name in "01"] == [[0], []]


@pytest.mark.parametrize("at", [3, 9])
def test_stopped_between_any_two_updates_it_goes_on_to_the_same_bits(at, tiny, tmp_path, monkeypatch):
    stale = {"ahead": 1, "reuse": [1, 2]}
    whole = dualign.train(settings(tiny, tmp_path, "whole", **stale), reward=vowels, quiet=True)
    update, done = Engine.update, []

    def stopping(self, *arguments):
        done.append(1)
        if len(done) == at:
            signal.raise_signal(signal.SIGTERM)
        return update(self, *arguments)

    monkeypatch.setattr(Engine, "update", stopping)
    config = settings(tiny, tmp_path, **stale)
    with pytest.raises(StopRun, match="stopped by SIGTERM"):
        dualign.train(config, reward=vowels, quiet=True)
    run = dualign.train(config, reward=vowels, quiet=True, resume=True)
    assert len(done) == len(metrics(run.folder)) * 2 + (1 + 2 + 2) * 2
    one, two = weights(whole.folder), weights(run.folder)
    assert all(torch.equal(one[key], two[key]) for key in one) and metrics(whole.folder) == metrics(run.folder)


def test_verify_and_replay_know_every_use(tiny, tmp_path):
    run = dualign.train(settings(tiny, tmp_path, ahead=1, reuse=[1, 2]), reward=vowels, quiet=True)
    assert verify(run.folder) == []
    told = CliRunner().invoke(application(), ["replay", str(run.folder)])
    lines = told.output.splitlines()
    assert told.exit_code == 0 and len(lines) == 4 + 5 and all("identical" in line for line in lines)
    assert any(line.startswith("batch    1 again in 3") for line in lines)
    (foreign := run.reused_dir / "notes.parquet").touch()
    assert run.reused(3) == [2, 1]
    foreign.unlink()
    path = run.reused_path(3, 1)
    table = pq.read_table(path)
    pq.write_table(
        table.set_column(table.column_names.index("algo.weight"), "algo.weight", table["algo.clipped"]), path
    )
    assert [finding.kind for finding in verify(run.folder)] == ["damaged"]


def stopped(config, monkeypatch, update, reward=vowels):
    """A run that is told to stop during its update of this number, from 1 on."""
    real, done = Engine.update, []

    def stopping(self, *arguments):
        done.append(1)
        if len(done) == update:
            signal.raise_signal(signal.SIGTERM)
        return real(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "update", stopping)
        with pytest.raises(StopRun):
            dualign.train(config, reward=reward, quiet=True)


@pytest.mark.parametrize(("at", "lost", "past"), [
    (3, 0, r"000001\+1"),  # in the midst of batch 1, all of batch 2
    (3, 1, r"000001\+1"),  # the last lines
    (4, 0, "000002"),  # between two batches
])  # fmt: skip
def test_a_batch_that_was_sampled_ahead_and_lost_is_named(at, lost, past, tiny, tmp_path, monkeypatch):
    """Its policy is gone: another must not sample it in silence."""
    config = settings(tiny, tmp_path, ahead=1)
    stopped(config, monkeypatch, at)
    (journal,) = (tmp_path / "run" / "batches").glob("000002.*.journal")
    kept = [line for line in journal.read_bytes().splitlines(True) if b"behaviour" not in line]
    journal.write_bytes(b"".join(kept) if lost else b"")
    with pytest.raises(UserError, match=rf"000002\.\*\.journal: missing.*{past} is past the policy"):
        dualign.train(config, reward=vowels, quiet=True, resume=True)


@pytest.mark.parametrize(("at", "lost"), [(8, "batches/000002.parquet"), (9, "reused/000002-000001.parquet")])
def test_what_was_trained_on_and_lost_is_named(at, lost, tiny, tmp_path, monkeypatch):
    """Updates of it are done: the policy that made it is gone, and a later one must not make it in silence."""
    config, path = settings(tiny, tmp_path, reuse=[1, 2]), tmp_path / "run" / lost
    whole = dualign.train(settings(tiny, tmp_path, "whole", reuse=[1, 2]), reward=vowels, quiet=True)
    stopped(config, monkeypatch, at)
    path.unlink()
    with pytest.raises(UserError, match=rf"{path}: missing, and .*000002\+\d is past the policy"):
        dualign.train(config, reward=vowels, quiet=True, resume=True)
    if path.parent.name == "reused":
        with pytest.raises(UserError, match=f"{path}: missing"):
            list(stored(Run.open(tmp_path / "run"), uses=True))
    shutil.rmtree(Run.open(tmp_path / "run").resumable())
    run = dualign.train(config, reward=vowels, quiet=True, resume=True)
    one, two = weights(whole.folder), weights(run.folder)
    assert all(torch.equal(one[key], two[key]) for key in one) and metrics(whole.folder) == metrics(run.folder)


def test_a_run_that_was_stopped_in_its_last_batch_can_be_made_longer(tiny, tmp_path, monkeypatch):
    """No policy was to sample the batch that comes next: this one does."""
    stopped(settings(tiny, tmp_path, ahead=1, online_batches=2), monkeypatch, 3)
    run = dualign.train(settings(tiny, tmp_path, ahead=1, online_batches=4), reward=vowels, quiet=True, resume=True)
    assert len(metrics(run.folder)) == 4 and verify(run.folder) == []


@pytest.mark.parametrize("section", [("rollout", {"ahead": 1}), ("train", {"reuse": [2]})])
def test_a_system_that_needs_its_own_samples_says_so(section, tiny, tmp_path):
    name, values = section
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "grpo"})
    config[name] |= values
    with pytest.raises(UserError, match=f"{name}.{next(iter(values))}: grpo learns only from what π_t sampled"):
        build(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ahead", [0, 1])
def test_stopped_while_it_waits_for_labels_it_goes_on_to_the_same_bits(ahead, tiny, tmp_path):
    calls = []

    def stopping(completions, **columns):
        calls.append(1)
        if len(calls) == 3:  # batch 1's: what π_0 is evaluated on and batch 0 are labelled
            signal.raise_signal(signal.SIGTERM)
            time.sleep(1.5)  # longer than the loop takes to look
        return vowels(completions)

    config = settings(tiny, tmp_path, ahead=ahead)
    with pytest.raises(StopRun, match="stopped by SIGTERM"):
        dualign.train(config, reward=stopping, quiet=True)
    run = dualign.train(config, reward=stopping, quiet=True, resume=True)
    asked = len(calls)
    whole = dualign.train(settings(tiny, tmp_path, "whole", ahead), reward=stopping, quiet=True)
    assert len(calls) == 2 * asked, "what was being labelled when it stopped was not asked for again"
    one, two = weights(whole.folder), weights(run.folder)
    assert all(torch.equal(one[key], two[key]) for key in one) and metrics(whole.folder) == metrics(run.folder)


class Slowing(FaultServer):
    """Answers the first requests at once, and later ones after 5 s."""

    fast = 20
    latency = property(lambda self: 0 if self.stats.calls <= self.fast else 5, lambda self, value: None)


def test_replies_that_come_after_a_stop_are_in_the_run_and_not_only_in_the_cache(tiny, tmp_path, monkeypatch):
    """Stopped while batch 1 is labelled and batch 0 trained on. The cache is lost with the machine, say."""
    with Slowing() as server:
        config = settings(tiny, tmp_path, ahead=1, online_batches=2)
        judge = {"type": "judge", "rubric": "helpfulness", "base_url": server.url, "model": "m", "concurrency": 2}
        config |= {"reward": [judge | {"cache": str(tmp_path / "one")}]}
        config["data"]["eval"], config["run"]["preview"] = None, 0
        stopped(config, monkeypatch, 1, reward=())
        (journal,) = (tmp_path / "run" / "batches").glob("000001.*.journal")
        kept = Book(journal.with_suffix("").with_suffix("")).labels("0")
        assert 4 < len(kept) < 16 and len(server.stats.bought) == 16 + len(kept)
        server.fast = 10**9
        config["reward"] = [judge | {"cache": str(tmp_path / "two")}]
        dualign.train(config, quiet=True, resume=True)
        assert set(server.stats.bought.values()) == {1} and len(server.stats.bought) == 32
