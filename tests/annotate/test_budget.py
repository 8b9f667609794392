"""Ceilings hold against what is in flight, against other processes, and against a kill -9."""

import multiprocessing
import os
import random
import signal
from pathlib import Path

import pytest

import dualign
from dualign.annotate.base import Item, label_all
from dualign.annotate.budget import Hold, Ledger, Spent, account, prompt_bound
from dualign.annotate.endpoints import Endpoint, JudgeReward
from dualign.annotate.judge import JudgeAnnotator
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Prompt
from fault_server import FaultServer
from runs_common import tree, write_prompts

WHERE = {"base_url": "http://localhost:1/v1", "model": "m"}


def items(n: int) -> list[Item]:
    return [
        Item(i, i // 4, Prompt(str(i // 4), f"question {i // 4}"), f"answer {i} quality-{1 + i % 10}") for i in range(n)
    ]


@pytest.mark.parametrize("seed", range(200))
def test_no_order_of_holding_and_settling_passes_a_ceiling(seed: int) -> None:
    rng = random.Random(seed)
    prices = {"price_prompt": rng.choice([0.15, 3.0, 0.333]), "price_completion": rng.choice([0.6, 15.0])}
    ceilings = {
        "max_calls": rng.choice([None, rng.randint(1, 60)]),
        "max_tokens_total": rng.choice([None, rng.randint(1, 40_000)]),
        "max_dollars": rng.choice([None, round(rng.random() * 0.2, 4)]),
    }
    ledger = Ledger(None, Endpoint(**WHERE, **prices, **ceilings))
    calls, tokens, dollars = 0, 0, 0.0  # what a server counts
    flying: list[tuple[Hold, int, int]] = []
    for _ in range(300):
        if flying and rng.random() < 0.5:
            hold, prompt, completion = flying.pop(rng.randrange(len(flying)))
            ledger.settle(hold, prompt, completion)
        elif hold := ledger.hold(bound := rng.randint(1, 2000), most := rng.randint(0, 256)):
            prompt, completion = rng.randint(0, bound), rng.randint(0, most)  # billed as soon as it is sent
            flying.append((hold, prompt, completion))
            calls, tokens = calls + 1, tokens + prompt + completion
            dollars += prompt * prices["price_prompt"] / 1e6 + completion * prices["price_completion"] / 1e6
        for spent, most in ((calls, ceilings["max_calls"]), (tokens, ceilings["max_tokens_total"])):
            assert most is None or spent <= most
        assert ceilings["max_dollars"] is None or dollars <= ceilings["max_dollars"] + 1e-12
    for hold, prompt, completion in flying:
        ledger.settle(hold, prompt, completion)
    spent = ledger.spent()
    assert (spent.calls, spent.prompt_tokens + spent.completion_tokens) == (calls, tokens)
    assert spent.dollars == pytest.approx(dollars, abs=1e-9) and spent.held_tokens == 0


@pytest.mark.parametrize("ceiling", ["max_calls", "max_tokens_total", "max_dollars"])
@pytest.mark.parametrize("faults", [0.0, 0.3])
def test_a_real_run_stops_at_its_ceiling_and_goes_on_when_it_is_raised(
    tmp_path: Path, ceiling: str, faults: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualign.annotate.request.FIRST_WAIT", 0.02)
    kinds = ("429", "500", "malformed", "no_choice")
    with FaultServer(faults=faults, kinds=kinds, retry_after="0.01", usage=(1, 1), seed=3) as server:
        top: dict[str, float | int] = {"max_calls": 40, "max_tokens_total": 40_000, "max_dollars": 0.05}
        settings = {"base_url": server.url, "model": "m", "rubric": "helpfulness", "price_prompt": 1.0,
                    "price_completion": 4.0, "concurrency": 16, "cache": str(tmp_path / "c.sqlite")}  # fmt: skip
        judge = JudgeAnnotator(JudgeReward(**settings, **{ceiling: top[ceiling]}), ledger=tmp_path / "spent.sqlite")
        with pytest.raises(StopRun, match=ceiling):
            label_all(judge, items(120))
        judge.close()
        spent = judge_spent(settings, tmp_path)
        assert {"max_calls": spent.calls, "max_tokens_total": spent.prompt_tokens + spent.completion_tokens,
                "max_dollars": spent.dollars}[ceiling] <= top[ceiling]  # fmt: skip
        assert server.stats.calls == spent.calls
        assert 0 < server.stats.tokens <= spent.prompt_tokens + spent.completion_tokens  # nothing unaccounted for
        before = sum(server.stats.bought.values())
        assert before > 0
        judge = JudgeAnnotator(JudgeReward(**settings), ledger=tmp_path / "spent.sqlite")
        labels = label_all(judge, items(120))
        judge.close()
        assert [label.value for label in labels] == [1 + i % 10 for i in range(120)]
        assert server.stats.as_json()["bought_twice"] == 0


def judge_spent(settings: dict[str, object], folder: Path) -> Spent:
    ledger = Ledger(folder / "spent.sqlite", JudgeReward(**settings))
    try:
        return ledger.spent()
    finally:
        ledger.close()


def test_a_run_writes_down_what_it_has_paid(tiny: Path, tmp_path: Path) -> None:
    with FaultServer(usage=(10, 1)) as server:
        judge = {"type": "judge", "rubric": "helpfulness", "base_url": server.url, "model": "m", "price_prompt": 2.0,
                 "cache": str(tmp_path / "c.sqlite")}  # fmt: skip
        runs = []
        for name in ("bought", "cached"):  # the second finds every label in the cache
            config = tree(tiny, write_prompts(tmp_path), tmp_path / name, {"name": "dar"}, online_batches=2)
            config["data"]["eval"] = None
            runs.append(dualign.train(config | {"reward": [judge]}, quiet=True))
    paid = [record["dollars"] for record in runs[0].metrics()]
    assert 0 < paid[0] < paid[1] == account(runs[0].folder / "spent.sqlite")[-1] / 1e12
    assert all("dollars" not in record for record in runs[1].metrics())


def _hold_until_full(path: Path, granted: "multiprocessing.Queue[int]") -> None:
    ledger = Ledger(path, Endpoint(**WHERE, max_tokens_total=10_000))
    n = 0
    while ledger.hold(7, 3):
        n += 1
    granted.put(n)


def test_processes_share_one_ceiling(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    granted: multiprocessing.Queue[int] = context.Queue()
    workers = [context.Process(target=_hold_until_full, args=(tmp_path / "spent.sqlite", granted)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert sum(granted.get(timeout=5) for _ in workers) == 1000


def test_another_address_is_no_new_budget(tmp_path: Path) -> None:
    for url in ("http://a:1/v1", "http://a:1/v1/", "http://b:2/v1"):
        ledger = Ledger(tmp_path / "spent.sqlite", Endpoint(**{**WHERE, "base_url": url}, max_calls=3))
        while ledger.hold(1, 1):
            pass
        assert ledger.spent().calls == 3


def _hold_and_die(path: Path) -> None:
    Ledger(path, Endpoint(**WHERE, max_tokens_total=100)).hold(60, 0)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_had_in_flight_counts_as_spent(tmp_path: Path) -> None:
    worker = multiprocessing.get_context("spawn").Process(target=_hold_and_die, args=(tmp_path / "spent.sqlite",))
    worker.start()
    worker.join(60)
    ledger = Ledger(tmp_path / "spent.sqlite", Endpoint(**WHERE, max_tokens_total=100))
    assert worker.exitcode == -signal.SIGKILL
    assert ledger.spent().held_tokens == 60
    assert ledger.hold(41, 0) is None
    assert ledger.hold(40, 0)


@pytest.mark.parametrize(
    "text", ["hello world", "ünïcödé", "日本語のテキスト", "\u200b\u0000 🤖🤖", "a" * 5000, "\n\t  \n"]
)
def test_no_tokenizer_makes_more_tokens_than_the_bound(text: str) -> None:
    assert prompt_bound([text]) >= len(text.encode()) + 16


def test_a_ceiling_in_dollars_needs_prices():
    """At a price of nothing it would never stop anything; a stored configuration can still be read."""
    free = JudgeReward(rubric="helpfulness", base_url="http://localhost:1/v1", model="m", max_dollars=5)
    with pytest.raises(UserError, match="max_dollars: without price_prompt and price_completion"):
        Ledger(None, free)
    Ledger(None, free.model_copy(update={"price_completion": 0.4}))
