"""The three annotators over HTTP: what their labels are."""

import math
from pathlib import Path
from typing import Any

import pytest

from dualign import config as configs
from dualign.annotate.base import Item, label_all
from dualign.annotate.endpoints import JudgeReward, PreferenceReward, ServedReward
from dualign.annotate.faults import MalformedError
from dualign.annotate.judge import JudgeAnnotator, expected_score
from dualign.annotate.preference import PreferenceAnnotator, Verdict
from dualign.annotate.served import ServedAnnotator, read_value
from dualign.common.errors import UserError
from dualign.common.types import Label, Prompt
from fault_server import FaultServer


def items(qualities: list[int], k: int = 4) -> list[Item]:
    return [
        Item(i, i // k, Prompt(str(i // k), f"question {i // k}"), f"answer {i} quality-{q}")
        for i, q in enumerate(qualities)
    ]


def run(kind: Any, settings: Any, work: list[Item]) -> list[Label]:
    annotator = kind(settings)
    try:
        return label_all(annotator, work)
    finally:
        annotator.close()


def base(server: FaultServer, tmp_path: Path) -> dict[str, Any]:
    return {"base_url": server.url, "model": "m", "cache": str(tmp_path / "c.sqlite"), "timeout": 30.0}


def test_a_reward_has_its_part_and_the_judges_words(tmp_path: Path) -> None:
    with FaultServer() as server:
        (label,) = run(JudgeAnnotator, JudgeReward(**base(server, tmp_path), rubric="helpfulness"), items([7]))
    assert label.value == 7 and label.parts == {"helpfulness": 7} and label.note and "7" in label.note


@pytest.mark.parametrize("model", ["qwen2-7b", "qwen2.5-7b"])
@pytest.mark.parametrize("task", ["tldr", "helpful", "harmless"])
def test_the_papers_judge_that_would_think_is_told_not_to(
    task: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3-32B's thinking would not end within 256 tokens; Qwen2-72B's requests are as they were."""
    reward = configs.load(f"paper/{task}-{model}").reward[0]
    asked: list[dict[str, Any]] = []
    with FaultServer() as server:
        answer = server._succeed
        monkeypatch.setattr(server, "_succeed", lambda *given: (asked.append(given[1]), answer(*given)))
        (label,) = run(
            JudgeAnnotator, reward.model_copy(update={**base(server, tmp_path), "model": reward.model}), items([7])
        )
    assert label.value is not None and asked[0]["max_tokens"] == 256
    if reward.model == "Qwen/Qwen3-32B":
        assert asked[0]["chat_template_kwargs"] == {"enable_thinking": False}
    else:
        assert "chat_template_kwargs" not in asked[0] and "chat_template_kwargs" not in reward.decides()


def test_harm_is_the_negative_of_its_score(tmp_path: Path) -> None:
    with FaultServer() as server:
        labels = run(JudgeAnnotator, JudgeReward(**base(server, tmp_path), rubric="harmlessness"), items([9, 1]))
    assert [x.value for x in labels] == [-9, -1]


def test_samples_are_asked_apart_and_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as server:
        replies = iter(["SCORE: 4", "SCORE: 8", "no idea"])
        monkeypatch.setattr(
            server,
            "_succeed",
            lambda path, request, writer: server._send(writer, 200, server._chat(request, next(replies), "stop")),
        )
        settings = JudgeReward(**base(server, tmp_path), rubric="helpfulness", samples=3, temperature=0.7)
        (label,) = run(JudgeAnnotator, settings, items([1]))
    assert label.value == 6  # the mean of those that gave a score


def test_samples_need_a_temperature() -> None:
    with pytest.raises(ValueError, match="temperature"):
        JudgeReward(base_url="http://x/v1", model="m", rubric="helpfulness", samples=3)


def token(text: str, **top: float) -> dict[str, Any]:
    return {"token": text, "top_logprobs": [{"token": t.strip("_"), "logprob": math.log(p)} for t, p in top.items()]}


def test_the_expected_score() -> None:
    seven = [token("SCORE"), token(":"), token(" 7", _7=0.5, _8=0.3, _6=0.1, _10=0.05, the=0.05)]
    assert expected_score(seven, 7, 1, 10) == pytest.approx((3.5 + 2.4 + 0.6 + 0.5) / 0.95)
    assert expected_score([token("7", _7=0.6, _1=0.3)], 7, 1, 10) is None  # "1" may begin "10"
    assert expected_score([token("7", _7=1.0)], 7, 1, 10) == 7
    assert expected_score([], 7, 1, 10) is None
    assert expected_score([token("1", _1=0.9)], 10, 1, 10) is None  # digit by digit
    twice = [token("8", _8=0.9, _9=0.1), token("\n"), token("It lists"), token(" 8", _8=0.5, _3=0.5)]
    assert expected_score(twice, 8, 1, 10) == pytest.approx(8.1)  # the reply begins with it
    assert expected_score([token("It lists"), *twice], 8, 1, 10) is None  # which of the two is the score?
    assert expected_score([token("4", _4=0.5, _1=0.5)], 4, 1, 5) == 2.5


def test_a_preference_and_its_neighbours(tmp_path: Path) -> None:
    with FaultServer() as server:
        settings = PreferenceReward(**base(server, tmp_path), rubric="helpfulness")
        labels = run(PreferenceAnnotator, settings, items([3, 8, 9, 2, 1, 6, 5, 4]))
        assert server.stats.calls == 8  # four pairs, both orders
        odd = run(PreferenceAnnotator, settings, items([3, 8, 5, 7, 2, 6], k=3))
    assert [x.value for x in labels] == [0, 1, 1, 0, 0, 1, 1, 0]
    assert [x.value for x in odd] == [0, 1, None, None, 0, 1]
    assert odd[2].reason == "no second completion to compare with"


def test_the_harm_questions_answer_is_the_loser(tmp_path: Path) -> None:
    with FaultServer() as server:  # answers with the one that has more of it
        labels = run(
            PreferenceAnnotator, PreferenceReward(**base(server, tmp_path), rubric="harmlessness"), items([9, 2])
        )
    assert [x.value for x in labels] == [0, 1]


def test_a_judge_that_always_names_the_first_makes_ties(tmp_path: Path) -> None:
    with FaultServer(reply="1") as server:
        labels = run(
            PreferenceAnnotator, PreferenceReward(**base(server, tmp_path), rubric="helpfulness"), items([9, 2, 3, 4])
        )
    assert [x.value for x in labels] == [0.5, 0.5, 0.5, 0.5]


def test_an_order_without_an_answer_makes_the_pair_absent(tmp_path: Path) -> None:
    with FaultServer(reply="Both are fine.") as server:
        labels = run(
            PreferenceAnnotator, PreferenceReward(**base(server, tmp_path), rubric="helpfulness"), items([9, 2])
        )
    assert [(x.value, x.reason) for x in labels] == [(None, "the judge named neither")] * 2


@pytest.mark.parametrize(
    ("ab", "ba", "value"), [("a", "a", 1), ("b", "b", 0), ("a", "b", 0.5), ("b", "a", 0.5), ("a", None, None)]
)
def test_verdicts(ab: Any, ba: Any, value: float | None) -> None:
    assert Verdict(ab, ba).value == value


@pytest.mark.parametrize("route", ["classify", "pooling"])
def test_a_served_reward_model(tmp_path: Path, route: Any) -> None:
    talk = Prompt("2", ({"role": "user", "content": "hi"},))
    with FaultServer(faults=0.3, kinds=("500", "malformed")) as server:
        work = [*items([3, 8]), Item(2, 1, talk, "hello quality-5")]
        labels = run(ServedAnnotator, ServedReward(**base(server, tmp_path), route=route), work)
    assert [x.value for x in labels] == [3, 8, 5]


def test_served_shapes() -> None:
    assert read_value({"data": [{"probs": [0.25]}]}) == 0.25
    assert read_value({"data": [{"data": [[-1.5]]}]}) == -1.5
    for wrong in (
        {},
        {"data": []},
        {"data": [{"probs": []}]},
        {"data": [{"data": ["x"]}]},
        {"data": [{"data": [math.nan]}]},
    ):
        with pytest.raises(MalformedError):
            read_value(wrong)
    with pytest.raises(UserError, match="2 outputs"):
        read_value({"data": [{"probs": [0.2, 0.8]}]})


def test_annotators_import_without_torch() -> None:
    import subprocess
    import sys

    modules = "judge, preference, served, agreement"
    code = (
        f"import sys\nfrom dualign.annotate import {modules}\nsys.exit(bool({{'torch', 'openai'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
