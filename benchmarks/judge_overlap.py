"""Seconds to sample and label one online batch with a judge that takes 300 ms a call: asked as completions finish, and
asked only when all are sampled. Same model, prompts, seeds and judge; the two in turn.

    python benchmarks/judge_overlap.py [--repeats 5] [--concurrency 8] [--tokens 48]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from dualign import data
from dualign.annotate.base import Item
from dualign.annotate.endpoints import JudgeReward
from dualign.annotate.judge import JudgeAnnotator
from dualign.common.types import Rollout
from dualign.data.settings import DataConfig
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler

SERVER = Path(__file__).resolve().parents[1] / "tests" / "support" / "fault_server.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    options = parser.parse_args()
    model, tokenizer = load_model(ModelConfig(name="smollm2-135m-instruct"))
    policy = Policy(model, "bf16")
    policy.round()
    sampler = HFSampler(policy, tokenizer, 256)
    prompts = data.load_prompts("builtin:quickstart/train", DataConfig(train="builtin:quickstart/train"))[:16]
    requests = [Request(i, p, tokenizer.prompt(p)) for i, p in enumerate(prompts)]
    server = subprocess.Popen([sys.executable, str(SERVER), "--latency", "0.3"], stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    url = server.stdout.readline().split()[-1]
    try:
        with tempfile.TemporaryDirectory() as folder:
            judge = JudgeAnnotator(
                JudgeReward(
                    base_url=url,
                    model="m",
                    rubric="helpfulness",
                    concurrency=options.concurrency,
                    cache=f"{folder}/cache.sqlite",
                )
            )
            seconds: dict[bool, list[float]] = {True: [], False: []}
            for repeat in range(-1, options.repeats):  # the first pair is warm-up
                for overlapped in (True, False):
                    seed = (2 * (repeat + 1) + overlapped, 0)  # nothing comes from the cache
                    spent = one(sampler, judge, requests, options.tokens, seed, overlapped)
                    if repeat >= 0:
                        seconds[overlapped].append(spent)
            judge.close()
    finally:
        server.terminate()
    for overlapped, name in ((True, "asked as they finish"), (False, "asked at the end")):
        s = seconds[overlapped]
        print(f"{name:22} {statistics.median(s):.2f} s ({min(s):.2f}-{max(s):.2f})")


def one(
    sampler: HFSampler,
    judge: JudgeAnnotator,
    requests: list[Request],
    tokens: int,
    seed: tuple[int, int],
    overlapped: bool,
) -> float:
    start = time.perf_counter()
    session, waiting = judge.open(), []

    def done(r: Rollout) -> None:
        item = Item(r.index, r.group, r.prompt, r.text, r.completion_ids)
        session.add(item) if overlapped else waiting.append(item)

    sampler.sample(requests, Sampling(4, tokens, 0.9), seed, done)
    for item in waiting:
        session.add(item)
    assert len(session.close()) == 4 * len(requests)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
