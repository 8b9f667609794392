"""What goes wrong around a run: a full disk, memory, numbers, signals, rewards. It stops in words, keeps what it has,
and goes on to the same end."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import yaml

import dualign
from command import dualign as command
from dualign.common.errors import StopRun, UserError
from dualign.common.interrupt import Interrupts
from dualign.models.policy import Policy
from dualign.run.folder import Run
from dualign.run.journal import Book
from dualign.training.engine import Engine
from killing import prepare, readable, same
from runs_common import metrics, reward_file, tree, vowels, weights, write_prompts


@pytest.fixture(scope="module")
def still(tiny, tmp_path_factory):
    """An undisturbed run."""
    recipe, run, _ = prepare(tmp_path_factory.mktemp("still"), tiny, "dar", "run")
    assert command("train", recipe).code == 0
    return run


def go_on(recipe, run):
    return command("resume", run) if (run / "config.yaml").exists() else command("train", recipe)


# --- the disk ---


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def leave(disk, kib):
    """Fills the disk but for so many KiB."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    if kib is not None:
        free = shutil.disk_usage(disk).free
        filler.write_bytes(b"\0" * max(0, free - kib * 1024))


def test_a_full_disk_loses_nothing(small_disk, tiny, still, tmp_path):
    """Room is given a little at a time: every further write of the run meets the end of the disk once or more."""
    recipe, run, _ = prepare(small_disk, tiny, "dar", "run")
    stops = 0
    for kib in [0, 4, 8, 12, 20, 28, 40, 60, 100, 180, 300, 500, None]:
        leave(small_disk, kib)
        said = go_on(recipe, run)
        assert "Traceback" not in said.text
        if said.code == 0:
            break
        assert said.code == 2 and ("No space left" in said.err or "cannot be made" in said.err), said.text
        assert readable(run) == []
        stops += 1
    leave(small_disk, None)
    assert go_on(recipe, run).code == 0
    assert stops >= 5
    assert same(run, still) == [] and readable(run) == []


@pytest.mark.parametrize("call", ["fsync", "replace", "write"])
def test_every_write_may_be_the_one_that_fails(call, tiny, still, tmp_path, monkeypatch):
    """Each in turn, from the run's first: what was durable stays, and the run goes on."""
    recipe, run, _ = prepare(tmp_path, tiny, "dar", "run")
    real, left = getattr(os, call), [0]

    def fails(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, call, fails)
    for turn in range(100):
        left[0] = 1 + 5 * turn
        said = go_on(recipe, run)
        assert "Traceback" not in said.text and said.code in (0, 2), said.text
        if said.code == 0:
            break
        assert "No space left" in said.err or "cannot be made" in said.err
        assert readable(run) == []
    assert turn >= 3
    assert same(run, still) == []


def test_a_folder_that_cannot_be_written(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "file" / "run", {"name": "dar"})
    with pytest.raises(UserError, match=r"run\.dir: .* cannot be made"):
        dualign.train(config, reward=vowels, quiet=True)


def test_two_processes_on_one_run(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    run = dualign.train(config, quiet=True)
    run.lock()
    said = command("resume", run.folder, "train.online_batches=4")
    assert said.code == 2 and "another process is working on this run" in said.err
    run.unlock()
    assert command("resume", run.folder, "train.online_batches=4").code == 0
    assert [r["step"] for r in metrics(run.folder)] == [0, 1, 2, 3]


# --- memory ---


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing(where, tiny, tmp_path, monkeypatch, caplog):
    runs = []
    for failing in (False, True):
        folder = tmp_path / str(failing)
        folder.mkdir()
        config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"}, micro_batch_tokens=4096)
        if failing:
            monkeypatch.setattr(Policy, "forward", stingy(Policy.forward, 100, where))
        runs.append(dualign.train(config, reward=vowels, quiet=True).folder)
    assert "out of memory" in caplog.text and "2048 tokens" in caplog.text
    for a, b in zip(metrics(runs[0]), metrics(runs[1]), strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)
    one, two = weights(runs[0]), weights(runs[1])
    assert all(torch.allclose(one[k], two[k], atol=1e-5) for k in one)


def stingy(forward, most, where):
    """A policy that has memory for so many tokens at a time in training."""

    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def limited(self, micro):
        full = torch.is_grad_enabled() and micro.input_ids.numel() > most
        if full and where == "forward":
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
            )
        out = forward(self, micro)
        # the gradient of some parameters is made before memory ends
        return Full.apply(out) + 0 * out if full else out

    return limited


def test_no_memory_at_all_is_a_clean_stop(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(Policy, "forward", stingy(Policy.forward, 0, "forward"))
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    with pytest.raises(StopRun, match="out of memory, even for one prompt"):
        dualign.train(config, reward=vowels, quiet=True)


# --- numbers ---


def test_a_loss_that_is_not_a_number_never_steps(tiny, tmp_path, monkeypatch):
    steps = []
    real = Engine._step

    def poisoned(self, loss):
        steps.append(loss)
        if len(steps) == 4:  # the second update of batch 1
            next(iter(self.masters.named.values())).grad.fill_(float("nan"))
        return real(self, loss)

    monkeypatch.setattr(Engine, "_step", poisoned)
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    with pytest.raises(StopRun, match=r"online batch 1 .*000001\.parquet.*kept.*not finite; no step was taken"):
        dualign.train(config, quiet=True)
    monkeypatch.setattr(Engine, "_step", real)
    assert Run.open(tmp_path / "run").read_batch(1) is not None
    assert command("resume", tmp_path / "run").code == 0
    fresh = tree(tiny, write_prompts(tmp_path), tmp_path / "fresh", {"name": "dar"})
    dualign.train(fresh, reward=vowels, quiet=True)
    one, two = weights(tmp_path / "run"), weights(tmp_path / "fresh")
    assert all(torch.equal(one[k], two[k]) for k in two) and metrics(tmp_path / "run") == metrics(tmp_path / "fresh")


def test_a_policy_that_is_not_a_number_is_named_before_the_batch_is_used(tiny, tmp_path, monkeypatch):
    real = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, micro: real(self, micro) * float("nan"))
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}) | {"reward": [reward_file()]}
    del config["data"]["eval"]
    with pytest.raises(StopRun, match=r"online batch 0: log π_t of completion 0 is NaN or infinite .16 of 16 rows"):
        dualign.train(config, quiet=True)
    run = Run.open(tmp_path / "run")
    assert run.read_batch(0) is None and list(run.batches.glob("000000.*.journal"))
    monkeypatch.setattr(Policy, "forward", real)
    assert command("resume", run.folder).code == 0


# --- rewards ---


@contextlib.contextmanager
def reward_with(folder, old, new):
    """The run's reward function with one line of it changed."""
    path = folder / "run_reward.py"
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new, 1))
    yield
    path.write_text(source)


DIES = ("    texts =", "    1 / (len(completions) != 16)\n    texts =")  # in training, not in the evaluation before it
SILENT = ("return values", "return [None if len(values) == 16 else v for v in values]")


def test_a_reward_function_that_dies_is_named_and_the_run_resumes(tiny, still, tmp_path):
    recipe, run, _ = prepare(tmp_path, tiny, "dar", "run")
    with reward_with(tmp_path, *DIES):
        said = command("train", recipe)
    assert said.code == 2 and "ZeroDivisionError" in said.err and "Traceback" not in said.text
    assert command("resume", run).code == 0
    assert same(run, still) == []


def test_absent_labels_are_asked_for_again_once_they_stopped_the_run(tiny, still, tmp_path):
    recipe, run, _ = prepare(tmp_path, tiny, "dar", "run")
    with reward_with(tmp_path, *SILENT):
        said = command("train", recipe)
    assert said.code == 3 and "16 of 16 completions have no label" in said.err
    assert said.err.strip().endswith(f"to go on: dualign resume {run}")
    assert command("resume", run).code == 0
    assert same(run, still) == []


def test_the_data_must_not_change_under_a_batch_in_progress(tiny, tmp_path):
    recipe, run, _ = prepare(tmp_path, tiny, "dar", "run")
    with reward_with(tmp_path, *DIES):
        assert command("train", recipe).code == 2
    data = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    data.write_text("".join(json.dumps({**row, "id": f"new{i}"}) + "\n" for i, row in enumerate(rows)))
    said = command("resume", run)
    assert said.code == 2 and "data.train: prompts.jsonl has changed since the run began" in said.err
    about = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(
        json.dumps(about | {"inputs": None})
    )  # as of a run that was begun before there were any
    said = command("resume", run)
    assert said.code == 2 and "the training data is not what it was" in said.err


# --- signals ---

SLOW = """
import pathlib, time

def score(completions, **columns):
    pathlib.Path(__file__).with_name("asked").touch()
    time.sleep({})
    return [len(c[0]["content"]) / 9 for c in completions]
"""
ONCE = [(signal.SIGTERM, "SIGTERM", 0.05), (signal.SIGINT, "Ctrl-C", 3)]


def started(tmp_path, tiny, seconds, processes=1, until="run/batches/000001*"):
    """A run in processes of its own, with a reward that takes so long, once there is a file `until`."""
    (tmp_path / "slow.py").write_text(SLOW.format(seconds))
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=40)
    config["data"].pop("eval")
    config["reward"] = [{"type": "function", "path": f"{tmp_path / 'slow.py'}:score"}]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(config))
    from runs_common import launch

    process = launch(tmp_path / "recipe.yaml", processes=processes, wait=False)
    while not list(tmp_path.glob(until)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process


@pytest.mark.parametrize(("number", "word", "seconds"), ONCE)
def test_one_signal_checkpoints_and_stops(number, word, seconds, tiny, tmp_path):
    process = started(tmp_path, tiny, seconds)
    asked = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert f"stopped by {word}" in err and "Traceback" not in err
    assert time.monotonic() - asked < 20  # of a grace time that is commonly 30
    run = Run.open(tmp_path / "run")
    newest = run.resumable()
    assert newest is not None and int(newest.name.split("+")[0]) >= 1
    assert command("verify", run.folder).code == 0


@pytest.mark.slow
def test_of_several_processes_none_ends_before_all_have_what_is_in_flight(tiny, tmp_path):
    """A launcher ends the others once one has failed: the first alone waits for the reward that is at work."""
    process = started(tmp_path, tiny, 9, processes=2, until="asked")
    (first, _) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(first), signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert "stopped by SIGTERM" in err, err
    assert len(Book(tmp_path / "run" / "batches" / "000000").labels("0")) == 16


def test_a_second_ctrl_c_ends_at_once_but_not_its_echo(monkeypatch):
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # a launcher passes on what the terminal has sent already
        with pytest.raises(StopRun, match="Ctrl-C"):
            interrupts.check()
        now = time.monotonic()
        monkeypatch.setattr(time, "monotonic", lambda: now + 2)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
