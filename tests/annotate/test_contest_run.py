"""Runs that learn from compared completions, and a process that is killed amid a contest."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import dualign
from dualign.annotate.base import Item, label_all
from dualign.annotate.endpoints import PreferenceReward
from dualign.annotate.preference import PreferenceAnnotator
from dualign.common.types import Prompt
from dualign.run.verify import verify
from fault_server import FaultServer
from runs_common import metrics, tree, write_prompts

RESPONSES = re.compile(r"(?ms)^<<<(?:RESPONSE_\d+) ([0-9a-f]{16})>>>\n(.*?)\n<<<END RESPONSE_\d+ \1>>>")


def vowels(text: str) -> int:
    return sum(ch in "aeiou" for ch in text)


def judge_by_vowels(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(path: str, request: dict[str, Any], writer: Any) -> None:
        content = request["messages"][-1]["content"]
        shown = [vowels(text) for _, text in RESPONSES.findall(content)]
        tiers = [[str(i) for i, n in enumerate(shown, 1) if n == count] for count in sorted({*shown}, reverse=True)]
        ranked = " > ".join(" = ".join(tier) for tier in tiers)
        reply = ranked if content.rstrip().endswith("Ranking:") else "1" if shown[0] > shown[1] else "2"
        server._send(writer, 200, server._chat(request, reply, "stop"))

    monkeypatch.setattr(server, "_succeed", answer)


@pytest.mark.parametrize(
    ("algo", "pairs", "score"),
    [("dpo", "all", "wins"), ("ipo", "tournament", "bradley_terry"), ("slic", "ranking", "wins")],
)
def test_a_pair_system_takes_a_prompts_best_and_worst(
    algo: str, pairs: str, score: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultServer() as server:
        judge_by_vowels(server, monkeypatch)
        reward = {"type": "preference", "rubric": "helpfulness", "base_url": server.url, "model": "m", "pairs": pairs,
                  "score": score, "cache": str(tmp_path / "c.sqlite"), "concurrency": 8}  # fmt: skip
        config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": algo}, online_batches=1)
        config |= {"reward": [reward]}
        config["data"]["eval"] = None
        run = dualign.train(config, quiet=True)
    for step, record in enumerate(metrics(run.folder)):
        rows = pq.read_table(run.batch_path(step)).to_pylist()
        groups = [[row for row in rows if row["group"] == g] for g in sorted({row["group"] for row in rows})]
        assert all(len(group) == 4 for group in groups)
        decided = 0
        for group in groups:
            chosen = [row for row in group if row["algo.role"] == 1]
            rejected = [row for row in group if row["algo.role"] == -1]
            counts = [vowels(row["completion"]) for row in group]
            decided += len(chosen)
            if chosen:
                assert len(chosen) == len(rejected) == 1
                assert vowels(chosen[0]["completion"]) > vowels(rejected[0]["completion"])
                if pairs != "tournament":  # which need not find the very best
                    assert (vowels(chosen[0]["completion"]), vowels(rejected[0]["completion"])) == (
                        max(counts),
                        min(counts),
                    )
            else:
                assert len({row["reward"] for row in group}) == 1
        assert decided == record["pairs"] > 0
    assert not verify(run.folder)


KILLED = """
import os, signal, sys
from dualign.annotate.base import Item, label_all
from dualign.annotate.cache import Cache
from dualign.annotate.endpoints import PreferenceReward
from dualign.annotate.preference import PreferenceAnnotator
from dualign.common.types import Prompt

put, kept = Cache.put, []
def dies(self, *given, **more):
    put(self, *given, **more)
    kept.append(1)
    if len(kept) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
Cache.put = dies
url, cache = sys.argv[1:]
reward = PreferenceReward(base_url=url, model="m", rubric="helpfulness", pairs="tournament", cache=cache, concurrency=1)
work = [Item(i, i // 8, Prompt(str(i // 8), f"q{i // 8}"), f"answer {i} quality-{i * 7 % 16}", (), 8) for i in range(16)]
label_all(PreferenceAnnotator(reward), work)
"""


def test_a_contest_that_was_killed_is_held_on_without_buying_twice(tmp_path: Path) -> None:
    cache = str(tmp_path / "c.sqlite")
    with FaultServer() as server:
        done = subprocess.run([sys.executable, "-c", KILLED, server.url, cache], check=False)
        assert done.returncode == -signal.SIGKILL and server.stats.calls == 7
        reward = PreferenceReward(
            base_url=server.url, model="m", rubric="helpfulness", pairs="tournament", cache=cache, concurrency=8
        )
        work = [
            Item(i, i // 8, Prompt(str(i // 8), f"q{i // 8}"), f"answer {i} quality-{i * 7 % 16}", (), 8)
            for i in range(16)
        ]
        annotator = PreferenceAnnotator(reward)
        labels = label_all(annotator, work)
        annotator.close()
        assert server.stats.as_json()["bought_twice"] == 0
    assert all(label.value is not None for label in labels)
    best, worst = (pick(range(8), key=lambda i: i * 7 % 16) for pick in (max, min))
    assert labels[best].value > labels[worst].value  # type: ignore[operator]
