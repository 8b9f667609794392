"""The cache keeps what was bought: by content, from several processes, through a kill -9, and never a failure."""

import json
import multiprocessing
import os
import signal
from importlib import resources
from pathlib import Path

from dualign.annotate.base import Item, label_all
from dualign.annotate.cache import Cache, Row, canonical, key_of
from dualign.annotate.endpoints import JudgeReward
from dualign.annotate.judge import JudgeAnnotator
from dualign.common.types import Label, Prompt
from fault_server import FaultServer

REQUEST = {"model": "m", "rubric": "r", "messages": [{"role": "user", "content": "hi"}], "temperature": 0.0}


def label(server: FaultServer, cache: Path, texts: list[str], **more: object) -> list[Label]:
    settings = {"base_url": server.url, "model": "m", "rubric": "helpfulness", "cache": str(cache), **more}
    judge = JudgeAnnotator(JudgeReward(**settings))
    try:
        return label_all(judge, [Item(i, i, Prompt("1", "question"), text) for i, text in enumerate(texts)])
    finally:
        judge.close()


def test_the_key_is_the_content() -> None:
    key = key_of(canonical(REQUEST))
    assert key == key_of(canonical(dict(reversed(REQUEST.items()))))
    for change in (
        {"model": "n"},
        {"rubric": "s"},
        {"temperature": 0.5},
        {"messages": [{"role": "user", "content": "ho"}]},
    ):
        assert key_of(canonical({**REQUEST, **change})) != key


def test_nothing_is_bought_twice(tmp_path: Path) -> None:
    texts = [f"answer {i} quality-{1 + i % 10}" for i in range(20)]
    with FaultServer() as server:
        first = label(server, tmp_path / "c.sqlite", texts)
        again = label(server, tmp_path / "c.sqlite", texts)
        assert server.stats.calls == 20
    with FaultServer() as elsewhere:  # the same model at another address
        moved = label(elsewhere, tmp_path / "c.sqlite", texts)
        assert elsewhere.stats.calls == 0
    assert (
        [x.value for x in first]
        == [x.value for x in again]
        == [x.value for x in moved]
        == [1 + i % 10 for i in range(20)]
    )
    assert first[0].note == again[0].note


def test_other_settings_are_other_labels(tmp_path: Path) -> None:
    with FaultServer() as server:
        for more in ({}, {"model": "n"}, {"temperature": 0.5}, {"max_tokens": 64}, {"rubric": "summarization"}):
            label(server, tmp_path / "c.sqlite", ["quality-3"], **more)
        assert server.stats.calls == 5


def test_what_is_being_asked_is_not_asked_again(tmp_path: Path) -> None:
    with FaultServer(latency=0.1) as server:
        labels = label(server, tmp_path / "c.sqlite", ["quality-4"] * 50)
        assert server.stats.calls == 1
    assert {x.value for x in labels} == {4}


def test_failures_are_not_kept(tmp_path: Path) -> None:
    for reply in ("I'm sorry, I can't.", "a 6 or 7", "SCORE: 99"):
        with FaultServer(reply=reply) as server:
            assert label(server, tmp_path / "c.sqlite", ["quality-4"])[0].value is None
    with FaultServer() as server:
        assert label(server, tmp_path / "c.sqlite", ["quality-4"])[0].value == 4


def _fill_and_die(path: Path, start: int, kill: bool) -> None:
    cache = Cache(path)
    for i in range(start, start + 300):
        request = canonical({**REQUEST, "sample": i})
        cache.put(Row(key_of(request), "m", "r", request, {"text": str(i)}), (1, 1), 5)
        if kill and i == start + 200:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_reply_that_can_no_longer_be_read_is_bought_once_more_and_kept(tmp_path: Path) -> None:
    text = resources.files("dualign.annotate").joinpath("rubrics/helpfulness.yaml").read_text("utf-8")
    rubric = tmp_path / "mine.yaml"
    with FaultServer(reply="SCORE: 9") as server:
        rubric.write_text(text)
        assert label(server, tmp_path / "c.sqlite", ["x"], rubric=str(rubric))[0].value == 9
        rubric.write_text(text.replace("scale: [1, 10]", "scale: [1, 5]"))  # the same words, another scale
        server.reply = "SCORE: 4"
        for _ in range(3):
            assert label(server, tmp_path / "c.sqlite", ["x"], rubric=str(rubric))[0].value == 4
        assert server.stats.calls == 2


def test_several_processes_and_a_kill_leave_it_whole(tmp_path: Path) -> None:
    path, context = tmp_path / "c.sqlite", multiprocessing.get_context("spawn")
    workers = [context.Process(target=_fill_and_die, args=(path, start, start == 0)) for start in (0, 100, 1000)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    cache = Cache(path)
    assert cache._db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    kept = [row["request"]["sample"] for row in cache.rows()]
    assert sorted(kept) == [*range(400), *range(1000, 1300)]
    assert all(row["reply"] == {"text": str(row["request"]["sample"])} for row in cache.rows())


def test_the_summary_counts_what_was_saved(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c.sqlite")
    cache.put(Row("k", "m", "r", canonical(REQUEST), {"x": 1}), (90, 10), 2 * 10**12)
    for _ in range(3):
        cache.count_hit("k")
    (row,) = cache.summary()
    assert row == {
        "model": "m",
        "rubric": "r",
        "labels": 1,
        "saved_calls": 3,
        "saved_tokens": 300,
        "saved_dollars": 6.0,
    }
    assert json.dumps(list(cache.rows()))
