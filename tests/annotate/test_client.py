"""Faults of every kind: no wrong label, none lost, none bought twice; lasting ones stop with words that help."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from dualign.annotate import client
from dualign.annotate.base import Item, label_all
from dualign.annotate.client import Client, Pace
from dualign.annotate.endpoints import Endpoint, JudgeReward
from dualign.annotate.faults import retry_after
from dualign.annotate.judge import JudgeAnnotator
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label, Prompt
from fault_server import PASSING, FaultServer


def judge(server: FaultServer | str, folder: Path, **more: Any) -> JudgeAnnotator:
    url = server if isinstance(server, str) else server.url
    settings = {
        "base_url": url,
        "model": "m",
        "rubric": "helpfulness",
        "cache": str(folder / "c.sqlite"),
        "timeout": 30.0,
    }
    return JudgeAnnotator(JudgeReward(**{**settings, **more}))


def items(n: int) -> list[Item]:
    return [
        Item(i, i // 4, Prompt(str(i // 4), f"question {i // 4}"), f"answer {i} quality-{1 + i % 10}") for i in range(n)
    ]


def label(server: FaultServer | str, folder: Path, n: int, **more: Any) -> list[Label]:
    annotator = judge(server, folder, **more)
    try:
        return label_all(annotator, items(n))
    finally:
        annotator.close()


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualign.annotate.request.FIRST_WAIT", 0.02)


def test_faults_of_all_kinds(tmp_path: Path) -> None:
    with FaultServer(faults=0.3, slow=0.1, hang=60, seed=1) as server:
        labels = label(server, tmp_path, 200, timeout=10)  # an answer that a busy machine gives late is bought twice
        assert server.stats.as_json()["bought_twice"] == 0
        assert all(server.stats.faults[kind] for kind in PASSING)
    wrong = [i for i, x in enumerate(labels) if x.value not in (None, 1 + i % 10)]
    absent = [x.reason for x in labels if x.value is None]
    assert not wrong
    assert absent and set(absent) <= {"refused", "cut off before an answer"}  # a passing fault loses none


@pytest.mark.parametrize("kind", PASSING)
def test_each_passing_fault_passes(tmp_path: Path, kind: str) -> None:
    with FaultServer(faults=0.4, kinds=(kind,), slow=0.1, hang=60, seed=2) as server:
        labels = label(server, tmp_path, 40, concurrency=20, timeout=2.0 if kind == "hang" else 30.0)
        assert server.stats.faults[kind]
    assert [x.value for x in labels] == [1 + i % 10 for i in range(40)]


def test_one_request_that_always_fails_is_absent_and_ends_nothing(tmp_path: Path) -> None:
    with FaultServer(faults=1.0, kinds=("500",)) as server:
        assert label(server, tmp_path, 1, retries=2)[0].reason == "HTTP 500: boom (3 attempts)"


def test_retry_after_is_honoured(tmp_path: Path) -> None:
    with FaultServer(faults=1.0, kinds=("429",), retry_after="2") as server:
        annotator = judge(server, tmp_path, retries=2, concurrency=4)
        session = annotator.open()
        for item in items(4):
            session.add(item)
        time.sleep(0.3)
        first = server.stats.calls
        server.faults = 0.0
        assert first <= 4  # nobody asked again before the 2 s were over
        assert {i: x.value for i, x in session.close().items()} == {i: 1 + i for i in range(4)}
        annotator.close()


def test_retry_after_reads_seconds_and_dates() -> None:
    assert retry_after("2.5") == 2.5
    assert retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.05  # past
    assert retry_after("Wed, 21 Oct 2115 07:28:00 GMT") == 600
    assert retry_after("soon") is None and retry_after(None) is None


def test_a_judge_that_is_down_stops_the_run_and_what_was_labelled_is_kept(tmp_path: Path) -> None:
    with FaultServer() as server:
        label(server, tmp_path, 4)
        gone = server.url
    with pytest.raises(StopRun, match=r"cannot connect.*kept"):
        label(gone, tmp_path, 8, retries=2)
    assert [x.value for x in label(gone, tmp_path, 4)] == [1, 2, 3, 4]


def test_a_judge_that_only_fails_stops_the_run(tmp_path: Path) -> None:
    with FaultServer(faults=1.0, kinds=("malformed",)) as server, pytest.raises(StopRun, match="malformed reply"):
        label(server, tmp_path, 40, retries=1)


@pytest.mark.parametrize(
    ("status", "told"),
    [(401, "MY_KEY"), (403, "MY_KEY"), (404, "base_url"), (400, "rejects"), (402, "credit"), (422, "no such model")],
)
def test_a_lasting_fault_says_what_to_mend(tmp_path: Path, status: int, told: str) -> None:
    with FaultServer(status=status) as server, pytest.raises(UserError, match=told):
        label(server, tmp_path, 3, api_key_env="MY_KEY")


def test_the_key_is_sent_and_never_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", "sk-very-secret-key")
    with FaultServer(key="sk-very-secret-key") as server:
        assert label(server, tmp_path, 1, api_key_env="MY_KEY")[0].value == 1
        monkeypatch.setenv("MY_KEY", "sk-wrong-secret-key")
        with pytest.raises(UserError) as error:  # this server repeats the key in its error
            label(server, tmp_path, 2, api_key_env="MY_KEY")
    chain = [error.value, error.value.__cause__, error.value.__context__]
    assert "secret" not in " ".join(f"{e!r}{getattr(e, '__dict__', '')}" for e in chain)
    assert "secret" not in caplog.text


@pytest.mark.parametrize(("message", "reason"), [
    ("This model's maximum context length is 4096 tokens", "the prompt is too long for the judge"),
    ("blocked by the content_filter", "refused by the provider's content filter"),
])  # fmt: skip
def test_a_fault_of_one_prompt_is_absent(
    tmp_path: Path, message: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer() as server:
        plain = server._succeed

        def picky(path: str, request: dict[str, Any], writer: Any) -> None:
            if "answer 3" in request["messages"][-1]["content"]:
                server._send(writer, 400, b'{"error": {"message": "%s"}}' % message.encode())
            else:
                plain(path, request, writer)

        monkeypatch.setattr(server, "_succeed", picky)
        labels = label(server, tmp_path, 6)
    assert [x.value for x in labels] == [1, 2, 3, None, 5, 6]
    assert labels[3].reason == reason


def test_concurrency_is_a_limit_and_is_used(tmp_path: Path) -> None:
    with FaultServer(latency=0.05) as server:
        label(server, tmp_path, 60, concurrency=7)
        assert server.stats.most_at_once == 7


def test_requests_per_minute(tmp_path: Path) -> None:
    with FaultServer() as server:
        start = time.monotonic()
        label(server, tmp_path, 11, requests_per_minute=1200)  # one each 50 ms
        assert time.monotonic() - start >= 0.5


def test_tokens_per_minute_settle_to_what_was_used() -> None:
    import asyncio

    async def run() -> float:
        pace = Pace(60_000)  # a token each ms
        start = time.monotonic()
        for _ in range(4):
            await pace.take(1000)
            pace.give_back(900)
        return time.monotonic() - start

    assert 0.3 <= asyncio.run(run()) < 2.5  # 3 s and more if nothing were given back


def test_add_returns_at_once(tmp_path: Path) -> None:
    with FaultServer(latency=2) as server:
        annotator = judge(server, tmp_path, timeout=20.0)
        session = annotator.open()
        for item in items(50):
            session.add(item)
        assert not server.stats.bought  # nobody waited for a reply
        deadline = time.monotonic() + 60
        while server.stats.calls < 50 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.stats.calls == 50  # while the caller does something else
        assert len(session.close()) == 50
        annotator.close()


def test_a_server_that_always_says_at_once_is_not_asked_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "PATIENCE", 1.0)
    for wait in ("0", "nan"):
        with FaultServer(faults=1.0, kinds=("429",), retry_after=wait) as server, pytest.raises(StopRun):
            label(server, tmp_path, 9, retries=0)
        assert server.stats.calls < 100  # nine requests


def test_a_key_that_cannot_be_sent_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with FaultServer(key="good") as server:
        monkeypatch.setenv("OPENAI_API_KEY", "good\n")
        assert all(one.value is not None for one in label(server, tmp_path, 2))
    monkeypatch.setenv("OPENAI_API_KEY", "schlüssel")
    with pytest.raises(UserError, match="OPENAI_API_KEY: this key cannot be sent") as told:
        label("http://127.0.0.1:9/v1", tmp_path, 1)
    assert "schl" not in str(told.value)


@pytest.mark.parametrize(
    ("counts", "read"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, (5, 2)), ({"prompt_tokens": 5}, (5, 0)), (None, None), ({}, None),
        ({"prompt_tokens": 5, "completion_tokens": None}, None), ({"prompt_tokens": -5, "completion_tokens": 2}, None),
        ({"prompt_tokens": 5, "completion_tokens": "2"}, None), ({"prompt_tokens": True, "completion_tokens": 2}, None),
    ],
)  # fmt: skip
def test_a_count_that_is_none_is_billed_at_its_most(counts: object, read: object) -> None:
    assert client.usage({"usage": counts}) == read


def test_a_wrong_url_is_told_at_once() -> None:
    with pytest.raises(UserError, match="base_url"):
        Client(Endpoint(base_url="localhost:8000", model="m"))


WORKER = """
import sys
import dualign.annotate.request as request
from dualign.annotate.base import Item
from dualign.annotate.judge import JudgeAnnotator, windowed
from dualign.annotate.endpoints import JudgeReward
from dualign.common.types import Prompt
request.FIRST_WAIT = 0.05
url, cache, out, n = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
judge = JudgeAnnotator(JudgeReward(base_url=url, model="m", rubric="helpfulness", cache=cache, timeout=2.5,
                                   concurrency=8))
items = (Item(i, i, Prompt(str(i), f"question {i}"), f"answer {i} quality-{1 + i % 10}") for i in range(n))
with open(out, "w") as file:
    for item, asked in windowed(items, judge.ask, 32):
        label = judge.combine(asked)
        print(item.index, label.value, label.reason, sep="\t", file=file, flush=True)
judge.close()
"""


def test_kill_and_restart(tmp_path: Path) -> None:
    """What a kill may cost is what was in flight: at most `concurrency` replies a kill are bought again."""
    n, kills, rng = 200, 3, random.Random(5)
    out = tmp_path / "out.tsv"
    with FaultServer(faults=0.2, kinds=PASSING, latency=0.02, slow=0.1, hang=5, seed=4) as server:
        for attempt in range(kills + 1):
            command = [sys.executable, "-c", WORKER, server.url, str(tmp_path / "c.sqlite"), str(out), str(n)]
            process = subprocess.Popen(command)
            goal = server.stats.calls + rng.randint(20, 50)
            while attempt < kills and process.poll() is None and server.stats.calls < goal:
                time.sleep(0.005)
            if attempt < kills:
                os.kill(process.pid, signal.SIGKILL)
            process.wait(120)
        twice = server.stats.as_json()["bought_twice"]
    rows = [line.split("\t") for line in out.read_text().splitlines()]
    assert [float(value) for _, value, _ in rows] == [1 + i % 10 for i in range(n)]
    assert twice <= kills * 8
