"""`--batch`: labels from a batch API that behaves as OpenAI's does."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_server import BatchServer
from command import dualign as command
from dualign.annotate import batch
from dualign.annotate.base import Item, label_all
from dualign.annotate.batch import ahead, in_batches
from dualign.annotate.endpoints import JudgeReward, PreferenceReward, ServedReward
from dualign.annotate.judge import JudgeAnnotator
from dualign.annotate.preference import PreferenceAnnotator
from dualign.annotate.served import ServedAnnotator
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label, Prompt

KEY = "sk-batch-0123456789"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch, "FIRST_LOOK", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture
def server() -> Iterator[BatchServer]:
    with BatchServer(key=KEY) as running:
        yield running


def settings(server: BatchServer, folder: Path, **more: Any) -> JudgeReward:
    given: dict[str, Any] = {"rubric": "helpfulness", "base_url": server.url, "model": "gpt-x", "concurrency": 4}
    given["cache"] = str(folder / "labels.sqlite")
    return JudgeReward(**{**given, **more})


def items(count: int, first: int = 0) -> list[Item]:
    return [
        Item(i, i // 2, Prompt(str(i // 2), "How?"), f"quality-{1 + i % 10} {i}") for i in range(first, first + count)
    ]


def bought(server: BatchServer, folder: Path, rows: list[Item], **more: Any) -> list[Label]:
    with in_batches(folder / "state.batch"):
        judge = JudgeAnnotator(settings(server, folder, **more))
        try:
            return label_all(judge, rows)
        finally:
            judge.close()


def kept(folder: Path) -> int:
    return int(sqlite3.connect(folder / "labels.sqlite").execute("SELECT count(*) FROM reply").fetchone()[0])


def write(path: Path, count: int) -> Path:
    rows = [{"prompt": "How?", "completion": f"quality-{1 + i % 10} {i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def options(server: BatchServer, folder: Path) -> list[str]:
    judge = [
        f"--base-url={server.url}",
        "--model=gpt-x",
        f"--set=cache={folder / 'labels.sqlite'}",
        "--set=concurrency=4",
    ]
    return ["--rubric=helpfulness", *judge, f"--out={folder / 'out.jsonl'}"]


def test_a_file_is_labelled_by_one_batch_and_never_online(server, tmp_path):
    file = write(tmp_path / "rows.jsonl", 30)
    said = command("judge", file, *options(server, tmp_path), "--batch")
    assert said.code == 0, said.text
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").open()]
    assert [row["reward"] for row in rows] == [1 + i % 10 for i in range(30)]
    assert len(server.batches) == 1 and server.online == 0 and set(server.asked.values()) == {1}
    assert kept(tmp_path) == 30 and not list(tmp_path.glob("*batch*"))  # nothing is left to wait for
    assert command("judge", file, *options(server, tmp_path)).code == 0  # the same keys as those of single requests
    assert len(server.batches) == 1 and server.online == 0


def test_pairs_and_several_judges_go_out_together(server, tmp_path):
    given = settings(server, tmp_path).model_dump(exclude={"type", "expected_score"}, exclude_defaults=True)
    with in_batches(tmp_path / "state"):
        judge, pairs = JudgeAnnotator(settings(server, tmp_path)), PreferenceAnnotator(PreferenceReward(**given))
        ahead(lambda: (label_all(judge, items(6)), label_all(pairs, items(6))))
        assert server.batches == {}
        assert [label.value for label in label_all(pairs, items(4))] == [0, 1, 0, 1]
        assert len(server.batches) == 2  # of two clients; both are there before the first is waited for
        assert [label.value for label in label_all(judge, items(6))] == [1, 2, 3, 4, 5, 6]
        assert len(server.batches) == 2 and server.online == 0
        with pytest.raises(UserError, match="chat requests"):
            label_all(ServedAnnotator(ServedReward(base_url=server.url, model="m")), items(1))
        with pytest.raises(UserError, match="no batch API"):
            JudgeAnnotator(JudgeReward(rubric="helpfulness", serve="smollm2-135m-instruct"))


def test_what_is_not_answered_is_absent_with_its_reason(tmp_path):
    with BatchServer(key=KEY, rejected=0.2, silent=0.05, expires=0.3, ends="expired") as server:
        rows = [*items(9), Item(9, 9, Prompt("9", "How?"), "quality-none")]
        rows = [rows[-1], *rows[:-1]]
        rows = [*rows[1:5], rows[0], *rows[5:]]  # the unreadable one is among those that are asked
        labels = bought(server, tmp_path, rows)
    reasons = [label.reason or "" for label in labels]
    assert ["server had an error" in r for r in reasons] == [i < 2 for i in range(10)]
    assert reasons[2] == "no line in the batch's output (it was expired)"
    assert labels[4].note == "I will not say." and labels[3].value == 4 and labels[6].value == 6
    assert reasons[7:] == ["the batch expired before this was asked"] * 3
    assert kept(tmp_path) == 3 and server.online == 0


def test_a_later_command_asks_again_for_what_is_absent_alone(tmp_path):
    with BatchServer(key=KEY, expires=0.5, ends="cancelled") as server:
        assert sum(label.value is not None for label in bought(server, tmp_path, items(10))) == 5
        server.expires, server.ends = 0.0, "completed"
        assert [label.value for label in bought(server, tmp_path, items(10))] == [1 + i for i in range(10)]
        assert len(server.batches) == 2 and set(server.asked.values()) == {1}


def test_where_nothing_was_answered_the_command_stops_and_may_be_run_again(tmp_path):
    file = write(tmp_path / "rows.jsonl", 4)
    with BatchServer(key=KEY, expires=1.0, ends="expired") as server:
        said = command("judge", file, *options(server, tmp_path), "--batch")
        assert said.code == 3 and "never answered" in said.text and not (tmp_path / "out.jsonl").exists()
        server.expires = 0.0
        assert command("judge", file, *options(server, tmp_path), "--batch").code == 0
        assert len(server.batches) == 2 and set(server.asked.values()) == {1}


def test_ceilings_are_never_passed(server, tmp_path):
    """A ceiling leaves room for some of the rows at their worst; what the server counts makes room for more."""
    judge = {"price_prompt": 1.0, "price_completion": 1.0, "max_tokens": 8}
    with pytest.raises(StopRun, match=r"max_calls 5 .*Raise it and run again"):
        bought(server, tmp_path, items(12), max_calls=5, **judge)
    assert sum(server.asked.values()) == 5 and len(server.batches) == 1 and kept(tmp_path) == 5
    account = sqlite3.connect(tmp_path / "state.batch").execute("SELECT * FROM account").fetchone()
    assert account[1:4] == (5, 500, 10) and account[5:] == (0, 0)
    with pytest.raises(StopRun, match="max_calls"):  # the same command goes on with the same account
        bought(server, tmp_path, items(12), max_calls=5, **judge)
    assert sum(server.asked.values()) == 5
    # one row is at most about 2,000 tokens, and turns out as 102: several batches, each as large as there is room
    labels = bought(server, tmp_path, items(12), max_dollars=0.006, **judge)
    assert [label.value for label in labels] == [1 + i % 10 for i in range(12)]
    assert len(server.batches) > 2 and set(server.asked.values()) == {1}


def test_too_many_tokens_at_once_are_sent_in_parts(tmp_path):
    with BatchServer(key=KEY, enqueued=4) as server:
        labels = bought(server, tmp_path, items(10))
        assert [label.value for label in labels] == [1 + i for i in range(10)]
        assert set(server.asked.values()) == {1}


def test_files_are_split(server, tmp_path, monkeypatch):
    monkeypatch.setattr(batch, "MOST_ROWS", 4)
    assert all(label.value for label in bought(server, tmp_path, items(10)))
    assert sorted(b["request_counts"]["total"] for b in server.batches.values()) == [2, 4, 4]
    monkeypatch.setattr(batch, "MOST_BYTES", 5000)
    assert all(label.value for label in bought(server, tmp_path, items(4, first=20)))
    sizes = [file["bytes"] for file in server.files.values() if file["purpose"] == "batch"][3:]
    assert len(sizes) > 1 and max(sizes) <= 5000


def test_a_batch_that_is_invalid_says_why(tmp_path):
    with BatchServer(key=KEY, model="another") as server:
        with pytest.raises(UserError, match=r"batch_0 for invalid: The provided model 'gpt-x' is not supported"):
            bought(server, tmp_path, items(3), max_calls=3)
        server.model = "gpt-x"
        assert all(label.value for label in bought(server, tmp_path, items(3), max_calls=3))  # nothing was asked before
    with BatchServer(key="another") as server, pytest.raises(UserError, match="refuses the key") as refused:
        bought(server, tmp_path, items(3, first=5))
    assert KEY not in str(refused.value)
    with BatchServer(key=KEY, refuses="messages") as server, pytest.raises(UserError, match="Unsupported parameter"):
        bought(server, tmp_path, items(3, first=9))


def test_what_the_server_wants_put_otherwise_is_learned_from_the_error_file(tmp_path):
    with BatchServer(key=KEY, refuses="max_tokens") as server:
        assert all(label.value for label in bought(server, tmp_path, items(6), max_tokens=16))
        assert len(server.batches) == 2 and set(server.asked.values()) == {1}
        assert all(label.value for label in bought(server, tmp_path, items(6, first=6), max_tokens=16))
        assert len(server.batches) == 3 and server.online == 0


def test_an_answer_that_is_lost_makes_no_second_batch(server, tmp_path):
    server.cut = ["POST files", "POST batches", "GET batches", "GET files"]
    server.broken = {"POST batches": [429, 500], "POST files": [503]}
    assert all(label.value for label in bought(server, tmp_path, items(5)))
    assert len(server.batches) == 1 and set(server.asked.values()) == {1}


STAGES = ("plan", "uploaded", "created", "ended", "put")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("before", [True, False])
def test_what_is_killed_goes_on(server, tmp_path, monkeypatch, stage, before):
    """Ended before or after each record of the state, a command that is run again asks for nothing twice."""
    from dualign.annotate.batch_state import State
    from dualign.annotate.cache import Cache

    owner = Cache if stage == "put" else State
    whole = getattr(owner, stage)

    class Killed(BaseException):
        pass

    def killed(self: Any, *given: Any, **more: Any) -> Any:
        if not before:
            whole(self, *given, **more)
        raise Killed

    monkeypatch.setattr(owner, stage, killed)
    monkeypatch.setattr(batch.Batches, "close", lambda self: self.state._lock.close())  # as a kill leaves it
    with pytest.raises(Killed):
        bought(server, tmp_path, items(6), max_calls=6 if stage != "plan" else 12)
    monkeypatch.setattr(owner, stage, whole)
    labels = bought(server, tmp_path, items(6), max_calls=6 if stage != "plan" else 12)
    assert [label.value for label in labels] == [1, 2, 3, 4, 5, 6]
    assert len(server.batches) == 1 and set(server.asked.values()) == {1}
    assert len([f for f in server.files.values() if f["purpose"] == "batch"]) == 1 or stage == "uploaded"


def test_a_kill_and_a_ctrl_c_while_it_waits(server, tmp_path):
    """A real process, by SIGKILL and then by SIGINT; the third finds the batch done."""
    file = write(tmp_path / "rows.jsonl", 8)
    server.held = True
    line = [sys.executable, "-m", "dualign", "judge", str(file), *options(server, tmp_path), "--batch"]
    for sent in (signal.SIGKILL, signal.SIGINT):
        looks = {"n": 0}
        waiting = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # fmt: skip
        assert waiting.stderr is not None
        for words in waiting.stderr:
            looks["n"] += 1
            if "in_progress" in words:
                break
        if sent == signal.SIGINT:
            busy = command("judge", file, *options(server, tmp_path), "--batch")
            assert busy.code == 2 and "another command is waiting" in busy.text
        waiting.send_signal(sent)
        waiting.wait(60)
        waiting.stderr.close()
        assert (tmp_path / "out.jsonl.batch").exists() and not (tmp_path / "out.jsonl").exists()
    assert KEY.encode() not in (tmp_path / "out.jsonl.batch").read_bytes()
    server.held = False
    said = command("judge", file, *options(server, tmp_path), "--batch")
    assert said.code == 0, said.text
    assert len(server.batches) == 1 and set(server.asked.values()) == {1} and len(server.asked) == 8


def test_an_evaluation_asks_for_all_at_once(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, better in (("a", 7), ("b", 3), ("c", 5)):
        rows = [{"instruction": f"say {i}", "output": f"quality-{better} {i}", "generator": name} for i in range(4)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    judge = {"type": "judge", "rubric": "helpfulness", "base_url": server.url, "model": "gpt-x",
             "cache": str(tmp_path / "labels.sqlite"), "concurrency": 4}  # fmt: skip
    said = command(
        "eval", "winrate", "a.json", "b.json", "--against", "c.json", "--judge", json.dumps(judge), "--batch"
    )
    assert said.code == 0, said.text
    assert len(server.batches) == 1 and server.online == 0 and set(server.asked.values()) == {1}
    assert "100" in said.text and not (tmp_path / "eval" / "batch.sqlite").exists()
    pairs = json.dumps(judge | {"type": "preference"})
    assert command("eval", "winrate", "a.json", "b.json", "--against", "c.json", "--judge", pairs, "--batch").code == 0
    assert len(server.batches) == 2 and server.online == 0
