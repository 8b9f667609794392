"""Labels per second beside a bare HTTP loop against the same server in the same run, and memory over many labels.

    python benchmarks/judge_throughput.py [--requests 3000] [--labels 20000] [--pairs 1000]

The server answers in 50 ms and 64 requests run at once, so 1280 a second is the most there can be. The bare loops post
the same bodies with httpx, and with the HTTP library that the openai package itself uses, and do nothing else: no
cache, no ledger, no extraction. A judged pair is two requests, one for each order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dualign.annotate.base import Item
from dualign.annotate.endpoints import JudgeReward
from dualign.annotate.judge import JudgeAnnotator, windowed
from dualign.annotate.rubric import load
from dualign.common.types import Prompt
from dualign.eval.judges import judge_pairs, open_judge
from dualign.eval.outputs import Answer, Outputs

SERVER = Path(__file__).resolve().parents[1] / "tests" / "support" / "fault_server.py"
CONCURRENCY, LATENCY = 64, 0.05


def items(n: int, start: int = 0) -> Iterator[Item]:
    for i in range(start, start + n):
        yield Item(i, i // 4, Prompt(str(i), f"question {i}"), f"answer {i} quality-{1 + i % 10} " + "word " * 100)


def bodies(n: int, start: int) -> list[dict[str, Any]]:
    rubric = load("helpfulness")
    sampling = {"model": "m", "temperature": 0.0, "max_tokens": 256}
    return [{"messages": rubric.reward_messages(i.prompt, i.completion), **sampling} for i in items(n, start)]


async def bare(http: ModuleType, url: str, requests: list[dict[str, Any]]) -> float:
    """Requests per second of 64 loops that post and read JSON."""
    limits = http.Limits(max_connections=CONCURRENCY, max_keepalive_connections=CONCURRENCY)
    async with http.AsyncClient(limits=limits, timeout=60) as client:
        todo = iter(requests)

        async def loop() -> None:
            for body in todo:
                reply = await client.post(f"{url}/chat/completions", json=body)
                assert reply.json()["choices"]

        start = time.monotonic()
        await asyncio.gather(*(loop() for _ in range(CONCURRENCY)))
        return len(requests) / (time.monotonic() - start)


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def ours(judge: JudgeAnnotator, n: int, start: int) -> float:
    began = time.monotonic()
    for item, asked in windowed(items(n, start), judge.ask, 4 * CONCURRENCY):
        assert judge.combine(asked).value == 1 + item.index % 10
    return n / (time.monotonic() - began)


def pairs(url: str, folder: Path, n: int, turn: int) -> float:
    """Pairs per second, judged in both orders as `eval winrate` has them judged."""
    settings = {
        "type": "preference",
        "base_url": url,
        "model": "m",
        "rubric": "helpfulness",
        "concurrency": CONCURRENCY,
    }
    sides = [{}, {}]
    for item in items(n, turn * n):
        for side, text in zip(sides, (item.completion, item.completion.replace("quality-", "quality-0.")), strict=True):
            side[str(item.index)] = (Answer(item.prompt, text),)
    with open_judge(json.dumps(settings | {"cache": f"{folder}/c.sqlite"}), ledger=folder) as judge:
        began = time.monotonic()
        judged = judge_pairs(judge, *(Outputs(name, side) for name, side in zip("ab", sides, strict=True)))
        spent = time.monotonic() - began
    assert len(judged) == n and all(pair.value is not None for pair in judged)
    return n / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=3000)
    parser.add_argument("--labels", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=1000)
    options = parser.parse_args()
    command = [sys.executable, str(SERVER), "--latency", str(LATENCY)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout
    url, n = server.stdout.readline().strip(), options.requests
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = JudgeReward(
                base_url=url, model="m", rubric="helpfulness", concurrency=CONCURRENCY, cache=f"{folder}/c.sqlite"
            )
            judge = JudgeAnnotator(settings, ledger=Path(folder, "spent.sqlite"))
            ours(judge, 200, 0)  # connections open, modules loaded
            memory = []  # first: the bare loops' request bodies would leave room to hide growth in
            for part in range(10):
                ours(judge, options.labels // 10, 10**7 + part * options.labels)
                memory.append(round(resident_mb(), 1))
            print(json.dumps({"labels": options.labels, "resident_mb_after_each_tenth": memory}), flush=True)
            speeds: dict[str, list[float]] = {}
            for turn in range(3):
                speeds.setdefault("dualign", []).append(ours(judge, n, 1000 + turn * n))
                for name in ("httpx", "httpx2"):
                    try:
                        http = __import__(name)
                    except ImportError:
                        continue
                    speeds.setdefault(name, []).append(asyncio.run(bare(http, url, bodies(n, 10**6))))
                speeds.setdefault("pairs", []).append(2 * pairs(url, Path(folder), options.pairs, turn))
            best = {name: max(found) for name, found in speeds.items()}
            print(json.dumps({"requests_per_second": {k: [round(x) for x in v] for k, v in speeds.items()}}))
            shares = {
                f"{mine}_of_{loop}": round(best[mine] / best[loop], 3)
                for mine in ("dualign", "pairs")
                for loop in ("httpx", "httpx2")
                if loop in best
            }
            print(json.dumps(shares), flush=True)
            seconds = [round(2 * options.pairs / x, 2) for x in speeds["pairs"]]
            print(json.dumps({f"seconds_for_{options.pairs}_pairs": seconds}))
            judge.close()
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
