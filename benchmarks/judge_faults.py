"""Labels through injected faults, and through kill -9: how many are wrong, lost, or bought twice.

    python benchmarks/judge_faults.py [--labels 2000] [--faults 0.3] [--kills 10]

A process labels `--labels` completions with a judge that fails in nine ways (tests/support/fault_server.py), once undisturbed
and once killed at `--kills` random moments and started again. Every label is checked against the truth that the server
computes from the text. Absent labels (refusals and cut-off replies, which are injected too) must each have a reason.
`kept_and_bought_again` counts successes that were in the cache when the process was killed and were bought again;
`bought_twice` counts all, those in flight at a kill included: replies that reached nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from dualign.annotate.base import Item
from dualign.annotate.cache import Cache
from dualign.annotate.endpoints import JudgeReward
from dualign.annotate.judge import JudgeAnnotator, windowed
from dualign.common.types import Prompt
from fault_server import FaultServer, key_of

CONCURRENCY = 32


def work(url: str, folder: str, labels: int) -> None:
    """Labels everything, in order, one line each: what a killed process left is in the cache."""
    cache, ledger = f"{folder}/cache.sqlite", Path(folder, "spent.sqlite")
    settings = JudgeReward(
        base_url=url, model="m", rubric="helpfulness", cache=cache, timeout=1.0, concurrency=CONCURRENCY
    )
    judge = JudgeAnnotator(settings, ledger=ledger)
    items = (
        Item(i, i // 4, Prompt(str(i), f"question {i}"), f"answer {i} quality-{1 + i % 10}") for i in range(labels)
    )
    with Path(folder, "out.jsonl").open("w") as file:
        for item, asked in windowed(items, judge.ask, 4 * CONCURRENCY):
            label = judge.combine(asked)
            print(json.dumps([item.index, label.value, label.reason]), file=file, flush=True)
    judge.close()


def cached(folder: str) -> list[str]:
    path = Path(folder, "cache.sqlite")
    rows = Cache(path).rows() if path.is_file() else []
    return [key_of(row["request"]["messages"][-1]["content"]) for row in rows]


def run(labels: int, faults: float, kills: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    with (
        tempfile.TemporaryDirectory() as folder,
        FaultServer(faults=faults, latency=0.05, hang=10, slow=0.5, seed=seed) as server,
    ):
        kept: dict[str, int] = {}  # by what was judged: how often it was bought when it was first seen in the cache
        start, killed, goals = time.monotonic(), 0, sorted(rng.sample(range(labels // 20, labels), kills))
        while True:
            command = [sys.executable, __file__, "--work", server.url, folder, str(labels)]
            process = subprocess.Popen(command)
            while process.poll() is None:
                if killed < kills and server.stats.calls >= goals[killed] + CONCURRENCY * killed:
                    os.kill(process.pid, signal.SIGKILL)
                    killed += 1
                    process.wait()
                    kept |= {key: server.stats.bought[key] for key in cached(folder) if key not in kept}
                    break
                time.sleep(0.002)
            if process.returncode == 0:
                break
        rows = [json.loads(line) for line in Path(folder, "out.jsonl").read_text().splitlines()]
        found = {index: (value, reason) for index, value, reason in rows}
        stats = server.stats.as_json()
        absent = Counter(reason for value, reason in found.values() if value is None)
        return {
            "labels": labels, "kills": killed, "seconds": round(time.monotonic() - start, 1),
            "wrong": sum(value not in (None, 1 + i % 10) for i, (value, _) in found.items()),
            "lost": labels - len(found),
            "labelled": sum(value is not None for value, _ in found.values()),
            "absent": dict(absent), "absent_without_reason": absent[None],
            "kept_and_bought_again": sum(server.stats.bought[key] - n for key, n in kept.items()),
            "kept_at_kills": len(kept), "bought_twice": stats["bought_twice"],
            "calls": stats["calls"], "faults": stats["faults"],
        }  # fmt: skip


def main() -> None:
    if sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=2000)
    parser.add_argument("--faults", type=float, default=0.3)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    for kills in (0, options.kills):
        print(json.dumps(run(options.labels, options.faults, kills, seed=kills)), flush=True)


if __name__ == "__main__":
    main()
