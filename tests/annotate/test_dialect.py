"""Judges of every family label at the first try: what they refuse is learned from their own words, at no label's cost."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from dualign.annotate import dialect
from dualign.annotate.base import Item, label_all
from dualign.annotate.endpoints import JudgeReward, PreferenceReward
from dualign.annotate.judge import JudgeAnnotator
from dualign.annotate.preference import PreferenceAnnotator
from dualign.common.errors import StopRun
from dualign.common.types import Label, Prompt
from strict_server import FAMILIES, StrictServer


def items(n: int) -> list[Item]:
    return [Item(i, i // 4, Prompt(str(i // 4), f"q {i // 4}"), f"answer {i} quality-{1 + i % 10}") for i in range(n)]


def ask(server: StrictServer, folder: Path, n: int = 24, **more: Any) -> tuple[list[Label], JudgeAnnotator]:
    kind: Any = PreferenceReward if more.pop("pairs", False) else JudgeReward
    settings = {"base_url": server.url, "model": "m", "rubric": "helpfulness", "cache": str(folder / "c.sqlite")}
    settings = kind(**(settings | {"timeout": 20.0, "concurrency": 16} | more))
    judge: Any = (PreferenceAnnotator if kind is PreferenceReward else JudgeAnnotator)(settings)
    try:
        return label_all(judge, items(n)), judge
    finally:
        judge.client.close()


@pytest.mark.parametrize("reply", ["text", "json", "choice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_labels_at_the_first_try(
    family: str, reply: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with StrictServer(family) as server, caplog.at_level(logging.WARNING):
        labels, _ = ask(server, tmp_path, reply=reply, expected_score=True, stop=["\n\n\n"])
        assert [label.value for label in labels] == [1 + i % 10 for i in range(24)]
        assert [label.reason for label in labels] == [None] * 24
        # one request went ahead: the others were not refused with it
        assert sum(server.refused.values()) <= 10
        refused = sum(server.refused.values())
        again, _ = ask(server, tmp_path / "again", n=8, reply=reply, expected_score=True, stop=["\n\n\n"])
        assert [label.value for label in again] == [1 + i % 10 for i in range(8)]
        assert sum(server.refused.values()) == refused, "learned once per endpoint and model"
    notes = [record.message for record in caplog.records]
    assert len(notes) == len(set(notes)), "said once"


@pytest.mark.parametrize("reply", ["text", "json", "choice"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compares(family: str, reply: Any, tmp_path: Path) -> None:
    with StrictServer(family) as server:
        labels, _ = ask(server, tmp_path, n=8, reply=reply, pairs=True)
    assert [label.value for label in labels] == [0, 1] * 4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("thinking", ["off", "on"])
def test_thinking_in_words(family: str, thinking: Any, tmp_path: Path) -> None:
    with StrictServer(family) as server:
        labels, _ = ask(server, tmp_path, thinking=thinking)
    assert [label.value for label in labels] == [1 + i % 10 for i in range(24)]


def test_a_hybrid_behind_vllm_is_told_not_to_think(tmp_path: Path) -> None:
    with StrictServer("vllm") as server:
        ask(server, tmp_path, thinking=False, chat_template_kwargs={"custom": 1})  # YAML's off
    assert all(
        r["chat_template_kwargs"] == {"enable_thinking": False, "thinking": False, "custom": 1} for r in server.seen
    )
    assert all(r["max_tokens"] == 256 for r in server.seen)


def test_a_judge_that_thinks_gets_room_once_and_its_thoughts_are_the_note(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with StrictServer("vllm") as server, caplog.at_level(logging.WARNING):
        labels, _ = ask(server, tmp_path)
        short = [r for r in server.seen if r["max_tokens"] == 256]
    assert all(label.value is not None and "others a 9" in (label.note or "") for label in labels)
    assert len(short) == 1 and len(server.seen) == 25  # one was cut off, alone
    assert sum("4,096 tokens" in record.message for record in caplog.records) == 1


def test_a_users_own_budget_stands(tmp_path: Path) -> None:
    with StrictServer("vllm") as server:
        labels, _ = ask(server, tmp_path, n=4, max_tokens=100)
    assert {label.reason for label in labels} == {"cut off while reasoning"}
    assert {r["max_tokens"] for r in server.seen} == {100}


def test_what_is_thought_is_paid_for(tmp_path: Path) -> None:
    """Gemini counts its thinking in the total alone; without a count the worst case is held."""
    for family in ("gemini", "gpt5"):
        with StrictServer(family) as server:
            settings = JudgeReward(base_url=server.url, model="m", rubric="helpfulness", price_completion=1.0,
                                   cache=str(tmp_path / f"{family}.sqlite"), max_tokens=1000)  # fmt: skip
            judge = JudgeAnnotator(settings)
            try:
                label_all(judge, items(8))
                spent = judge.client.spent()
            finally:
                judge.close()
        thought = {"gemini": 362, "gpt5": 312}[family]
        assert spent.completion_tokens == 8 * thought, family


def test_learning_passes_no_ceiling(tmp_path: Path) -> None:
    with StrictServer("gpt5") as server:
        with pytest.raises(StopRun, match="max_calls"):
            ask(server, tmp_path, max_calls=6)
        assert server.stats.calls <= 6


def test_faults_and_a_dialect_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualign.annotate.request.FIRST_WAIT", 0.02)
    with StrictServer("gpt5", faults=0.3, kinds=("429", "500", "cut", "malformed", "no_choice"), seed=3) as server:
        labels, _ = ask(server, tmp_path, n=120, retries=12, reply="json")
        stats = server.stats.as_json()
    assert [label.value for label in labels] == [1 + i % 10 for i in range(120)]
    assert stats["bought_twice"] == 0


def test_extra_fields_are_sent_and_part_of_the_key(tmp_path: Path) -> None:
    with StrictServer("vllm") as server:
        ask(server, tmp_path, n=4, extra_body={"top_k": 20, "provider": {"order": ["a"]}}, thinking="off")
        assert server.seen[0]["top_k"] == 20 and server.seen[0]["provider"] == {"order": ["a"]}
        before = len(server.seen)
        ask(server, tmp_path, n=4, extra_body={"top_k": 20, "provider": {"order": ["a"]}}, thinking="off")
        assert len(server.seen) == before  # bought once
        ask(server, tmp_path, n=4, extra_body={"top_k": 21}, thinking="off")
        assert len(server.seen) == before + 4


@pytest.mark.parametrize("name", ["n", "stream", "max_tokens", "temperature", "messages"])
def test_fields_that_are_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}:"):
        JudgeReward(base_url="http://x/v1", model="m", rubric="helpfulness", extra_body={name: 1})


def test_azures_version_stands_in_every_url(tmp_path: Path) -> None:
    with StrictServer("azure") as server:
        url = f"{server.url}/deployments/d?api-version=2024-06-01"
        settings = JudgeReward(base_url=url, model="m", rubric="helpfulness", cache=str(tmp_path / "c.sqlite"))
        judge = JudgeAnnotator(settings)
        try:
            labels = label_all(judge, items(4))
        finally:
            judge.close()
    assert [label.value for label in labels] == [1, 2, 3, 4]
    assert set(server.paths) == {"/v1/deployments/d/chat/completions?api-version=2024-06-01"}


def test_a_refusal_that_sends_the_prompt_back_teaches_nothing_of_it() -> None:
    from dualign.annotate.faults import _refusal

    said = [{"type": "x", "loc": ["body", "messages"], "msg": "bad", "input": "temperature is not supported"}]
    found = _refusal({"detail": said})
    assert found.param == "messages"
    tongue = dialect.Dialect("http://x/v1", "m")
    wants = {"temperature": 0.0, "max_tokens": 5}
    assert not tongue.learn(wants, tongue.spelled(wants), found.words, found.param)
    text = _refusal(f"[{{'type': 'x', 'msg': 'not permitted', 'input': {json.dumps('temperature')}}}]")
    assert not tongue.learn(wants, tongue.spelled(wants), text.words, text.param)


def test_rungs_are_only_climbed() -> None:
    tongue = dialect.Dialect("http://x/v1", "m")
    wants = {"temperature": 0.0}
    first = tongue.spelled(wants)
    assert tongue.learn(wants, first, "no temperature", "temperature")
    assert tongue.learn(wants, first, "no temperature", "temperature")  # sent before the first was refused
    assert tongue.spelled(wants).onto({}) == {}
    assert not tongue.learn(wants, tongue.spelled(wants), "no temperature", "temperature")
