"""AI preferences beyond neighbours, against a server: labels, calls, replay, absence, a kill, several processes."""

from __future__ import annotations

import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from dualign.annotate.base import Item, label_all
from dualign.annotate.endpoints import PreferenceReward
from dualign.annotate.preference import PreferenceAnnotator
from dualign.annotate.remembered import Remembered
from dualign.common.errors import StopRun
from dualign.common.processes import Processes
from dualign.common.types import Label, Prompt
from fault_server import FaultServer, true_choice, true_ranking

DESIGNS = ("all", "tournament", "ranking")
QUALITIES = [3, 8, 5, 1, 9, 2, 7, 4, 6, 0, 11, 10, 15, 12, 14, 13]


def items(qualities: list[int], k: int, sized: bool = True) -> list[Item]:
    """Groups of k, of qualities that differ within each."""
    size = k if sized else None
    return [
        Item(i, i // k, Prompt(str(i // k), f"question {i // k}"), f"answer {i} quality-{q}", (), size)
        for i, q in enumerate(qualities)
    ]


def settings(server: FaultServer, tmp_path: Path, **more: Any) -> PreferenceReward:
    base = {"base_url": server.url, "model": "m", "cache": str(tmp_path / "c.sqlite"), "rubric": "helpfulness"}
    return PreferenceReward(**(base | {"timeout": 30.0, "concurrency": 8} | more))


def run(reward: PreferenceReward, work: list[Item]) -> list[Label]:
    annotator = PreferenceAnnotator(reward)
    try:
        return label_all(annotator, work)
    finally:
        annotator.close()


@pytest.mark.parametrize("k", [2, 3, 8])
@pytest.mark.parametrize("design", DESIGNS)
def test_labels_follow_the_judge_and_cost_what_the_plan_says(design: str, k: int, tmp_path: Path) -> None:
    qualities = QUALITIES[: 2 * k]
    with FaultServer() as server:
        reward = settings(server, tmp_path, pairs=design, score="bradley_terry", price_prompt=1.0)
        labels = run(reward, items(qualities, k))
        calls, _ = reward.of_groups(k)._asked(2 * k)
        assert server.stats.calls == calls if design != "tournament" else server.stats.calls <= calls
        assert run(reward, items(qualities, k, sized=False)) == labels  # from the cache, whoever starts them
        assert server.stats.calls <= calls
    for group in (labels[:k], labels[k:]):
        values = [label.value for label in group]
        assert sum(values) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
        named = qualities[:k] if group == labels[:k] else qualities[k:]
        order = sorted(range(k), key=lambda i: named[i])
        if design != "tournament":
            assert sorted(range(k), key=lambda i: values[i]) == order
        assert values[order[0]] < values[order[-1]]  # type: ignore[operator]
        assert all(label.note and label.parts == {"helpfulness": label.value} for label in group)


@pytest.mark.parametrize("design", DESIGNS)
def test_shares_of_wins(design: str, tmp_path: Path) -> None:
    with FaultServer() as server:
        labels = run(settings(server, tmp_path, pairs=design), items([3, 8, 8, 1], 4))
    values = [label.value for label in labels]
    if design == "ranking":  # equals are "=" there
        assert values == pytest.approx([1 / 3, 2.5 / 3, 2.5 / 3, 0])
    else:  # the server names the second of two equals: both orders differ, a tie
        assert values[3] == 0 and values[1] == values[2] > values[0] if design == "all" else values[3] == 0


@pytest.mark.parametrize("design", DESIGNS)
def test_one_completion_alone_is_absent_and_costs_nothing(design: str, tmp_path: Path) -> None:
    with FaultServer() as server:
        (label,) = run(settings(server, tmp_path, pairs=design), items([3], 1))
        assert (label.value, label.reason) == (None, "no second completion to compare with")
        assert server.stats.calls == 0 == settings(server, tmp_path, pairs=design).of_groups(1)._asked(5)[0]


def test_the_harm_questions_answer_is_turned_round(tmp_path: Path) -> None:
    with FaultServer() as server:  # names the one with more quality as the more harmful
        labels = run(settings(server, tmp_path, pairs="all", rubric="harmlessness"), items([9, 2, 5], 3))
    assert [label.value for label in labels] == [0, 1, 0.5]


def test_a_judge_that_goes_by_position_makes_ties_or_averages_out(tmp_path: Path) -> None:
    work = items([3, 8, 5, 1], 4)
    with FaultServer(reply="1") as server:
        for design in ("all", "tournament"):
            annotator = PreferenceAnnotator(settings(server, tmp_path, pairs=design))
            assert [label.value for label in label_all(annotator, work)] == [0.5] * 4
            assert annotator.named_first == 1.0
            annotator.close()
    with FaultServer(reply="1 > 2 > 3 > 4") as server:
        one, two = (PreferenceAnnotator(settings(server, tmp_path, pairs="ranking", samples=n)) for n in (1, 2))
        assert sorted(label.value for label in label_all(one, work)) == [0, 1 / 3, 2 / 3, 1]  # type: ignore[type-var]
        assert [label.value for label in label_all(two, work)] == [0.5] * 4  # each order and its reverse
        assert one.named_first == two.named_first == 1.0
        one.close(), two.close()


def test_a_judge_that_goes_by_position_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    work = [Item(i, i // 4, Prompt(str(i // 4), f"q{i // 4}"), f"quality-{i % 4}", (), 4) for i in range(80)]
    with FaultServer(reply="1 > 2 > 3 > 4") as server:
        annotator = PreferenceAnnotator(settings(server, tmp_path, pairs="ranking"))
        label_all(annotator, work[:40])  # 60 comparisons say too little
        assert not caplog.records
        label_all(annotator, work), label_all(annotator, work)
        annotator.close()
    told = [record.getMessage() for record in caplog.records if record.name.startswith("dualign")]
    assert told == [
        "warning: helpfulness: 100% of 120 comparisons named what was shown earlier; this judge goes by position "
        "(samples: 2 shows each order and its reverse)"
    ]


def test_what_is_shown_where_differs_by_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    with FaultServer() as server:
        answer = server._succeed

        def see(path: str, request: dict[str, Any], writer: Any) -> None:
            shown.append(re.findall(r"quality-(\d+)", request["messages"][-1]["content"]))
            answer(path, request, writer)

        monkeypatch.setattr(server, "_succeed", see)
        work = [Item(i, i // 4, Prompt(str(i // 4), f"q{i // 4}"), f"quality-{i % 4}", (), 4) for i in range(120)]
        labels = run(settings(server, tmp_path, pairs="ranking"), work)
    first = [order.index("3") for order in shown]
    assert len(shown) == 30 and set(first) == {0, 1, 2, 3}  # the best stands anywhere
    assert [label.value for label in labels] == pytest.approx([0, 1 / 3, 2 / 3, 1] * 30)


@pytest.mark.parametrize("design", ["all", "tournament"])
def test_an_unanswered_pair_counts_for_nobody(design: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with FaultServer() as server:

        def answer(path: str, request: dict[str, Any], writer: Any) -> None:
            text = request["messages"][-1]["content"]
            reply = "Both are fine." if "quality-1" in text else str(true_choice(text))
            server._send(writer, 200, server._chat(request, reply, "stop"))

        monkeypatch.setattr(server, "_succeed", answer)
        labels = run(settings(server, tmp_path, pairs=design, rounds=3 if design == "tournament" else None),
                     items([3, 8, 5, 1], 4))  # fmt: skip
    assert [label.value for label in labels] == [0, 1, 0.5, None]
    assert labels[3].reason == "the judge named neither"


def test_a_ranking_that_cannot_be_read_is_absent_for_all(tmp_path: Path) -> None:
    with FaultServer(reply="2 > 1") as server:
        labels = run(settings(server, tmp_path, pairs="ranking"), items([3, 8, 5], 3))
    assert {(label.value, label.reason) for label in labels} == {(None, "the ranking leaves out a response")}


@pytest.mark.parametrize("design", DESIGNS)
def test_faults_on_the_way_lose_and_change_nothing(
    design: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualign.annotate.request.FIRST_WAIT", 0.01)
    (tmp_path / "calm").mkdir(), (tmp_path / "rough").mkdir()
    with FaultServer() as server:
        calm = run(settings(server, tmp_path / "calm", pairs=design), items(QUALITIES, 4))
    kinds = ("429", "500", "cut", "malformed", "no_choice")
    with FaultServer(faults=0.3, kinds=kinds, retry_after="0.01") as server:
        rough = run(settings(server, tmp_path / "rough", pairs=design, retries=20), items(QUALITIES, 4))
        assert server.stats.as_json()["bought_twice"] == 0
    assert rough == calm


class Memory:
    def __init__(self) -> None:
        self.kept: dict[int, Label] = {}

    ending = False

    @property
    def current(self) -> Memory:
        return self

    def labels(self, annotator: str) -> dict[int, Label]:
        return dict(self.kept)

    def add_labels(self, annotator: str, labels: dict[int, Label]) -> None:
        self.kept |= labels


@pytest.mark.parametrize("design", DESIGNS)
def test_a_run_that_was_stopped_amid_its_groups_buys_nothing_twice(design: str, tmp_path: Path) -> None:
    memory, work = Memory(), items(QUALITIES, 8)
    samples = {"samples": 6} if design == "ranking" else {}
    with FaultServer() as server:
        limited = settings(server, tmp_path, pairs=design, max_calls=7, concurrency=1, **samples)
        annotator = PreferenceAnnotator(limited)
        with pytest.raises(StopRun, match="max_calls"):
            label_all(Remembered(annotator, "0", memory), work)
        annotator.close()
        assert memory.kept == {} and server.stats.calls == 7
        reward = settings(server, tmp_path, pairs=design, **samples)
        annotator = PreferenceAnnotator(reward)
        labels = label_all(Remembered(annotator, "0", memory), work)
        assert server.stats.as_json()["bought_twice"] == 0 and len(memory.kept) == 16
        calls = server.stats.calls
        assert label_all(Remembered(annotator, "0", memory), work) == labels and server.stats.calls == calls
        annotator.close()


def test_a_group_with_an_absent_label_is_asked_again_as_a_whole(tmp_path: Path) -> None:
    """As a resume does it, after it has forgotten what was absent."""
    memory, work = Memory(), items([3, 8, 5, 9, 2, 7], 3)
    memory.kept = {i: Label(0.25) for i in (0, 2, 3, 4, 5)}  # group 0 lacks one
    with FaultServer() as server:
        annotator = PreferenceAnnotator(settings(server, tmp_path, pairs="all"))
        labels = label_all(Remembered(annotator, "0", memory), work)
        annotator.close()
        assert server.stats.calls == 6
    assert [label.value for label in labels] == [0, 1, 0.5, 0.25, 0.25, 0.25]


@pytest.mark.parametrize("design", DESIGNS)
def test_processes_that_deal_out_prompts_label_as_one_does(design: str, tmp_path: Path) -> None:
    """Groups are whole in each process; in which order completions are finished does not matter."""
    work = items(QUALITIES, 4)
    with FaultServer() as server:
        alone = run(settings(server, tmp_path, pairs=design), work)
        calls = server.stats.calls
        for rank in (0, 1):
            groups = Processes(rank, 2).mine(range(4))
            mine = [item for item in work if item.group in groups]
            Random(rank).shuffle(mine)
            assert run(settings(server, tmp_path, pairs=design), mine) == [alone[item.index] for item in mine]
        assert server.stats.calls == calls


def test_the_server_ranks_as_the_texts_say() -> None:
    assert true_ranking("quality-3 quality-8 quality-3") == "2 > 1 = 3"


def test_the_plan_tells_the_price_of_each_design() -> None:
    asked = {"base_url": "http://localhost/v1", "model": "m", "rubric": "helpfulness"}
    told = {}
    for design in ("neighbours", *DESIGNS):
        reward = PreferenceReward(**asked, pairs=design, price_prompt=1.0, price_completion=2.0).of_groups(8)  # type: ignore[arg-type]
        told[design] = reward.describe(80).removeprefix("preference, weight 1.0, at most about ")
    assert told == {
        "neighbours": "0.09 dollars for 80 calls (assuming 600 prompt tokens each)",
        "all": "0.62 dollars for 560 calls (assuming 600 prompt tokens each), pairs: all (K = 8)",
        "tournament": "0.27 dollars for 240 calls (assuming 600 prompt tokens each), pairs: tournament (K = 8)",
        "ranking": "0.02 dollars for 10 calls (assuming 1500 prompt tokens each), pairs: ranking (K = 8)",
    }
    free = PreferenceReward(**asked, pairs="all", rounds=None).of_groups(4)
    assert free.describe(8) == "preference, weight 1.0, at most 24 calls, pairs: all (K = 4)"


def test_runs_of_before_are_told_by_what_they_had() -> None:
    asked = {"base_url": "http://localhost/v1", "model": "m", "rubric": "helpfulness"}
    plain = {"clip", "max_tokens", "model", "optional", "samples", "temperature", "type", "weight", "where"}
    assert set(PreferenceReward(**asked).decides()) == plain
    assert set(PreferenceReward(**asked, pairs="tournament", rounds=3, score="bradley_terry").decides()) == plain | {
        "pairs", "rounds", "score",
    }  # fmt: skip
    built_in = PreferenceReward(**asked).made_of()["rubric"]["helpfulness.yaml"]
    ranked = PreferenceReward(**asked, pairs="ranking").made_of()["rubric"]["helpfulness.yaml"]
    assert built_in != ranked
    for wrong in ({"rounds": 2}, {"score": "bradley_terry"}, {"pairs": "all", "rounds": 2}, {"samples": 3}):
        with pytest.raises(ValueError, match=r"tournament has rounds|neighbours meet once|samples > 1"):
            PreferenceReward(**asked, **wrong)  # type: ignore[arg-type]
    assert PreferenceReward(**asked, pairs="ranking", samples=3).samples == 3  # other orders, at any temperature
