"""Where the time of one online batch goes: seconds by phase, then the most expensive operators of each phase.

    python benchmarks/profile_batch.py [--algo dar] [--prompts 16] [--k 4] [--tokens 48]

The first online batch warms up, the second is timed, the third runs under torch.profiler (which slows it down).
"""

from __future__ import annotations

from dualign import rollout
from dualign.common import cpu

cpu.tune()

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from common import online_batch
from dualign.common.types import Rollout
from dualign.config import load
from dualign.rollout.base import Request
from dualign.training.clock import Clock
from dualign.training.engine import Engine
from dualign.training.source import load_stream


def reward(rollout: Rollout) -> float:
    return rollout.text.count("e") / max(1, len(rollout.text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="dar")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--operators", type=int, default=12, help="how many to list per phase")
    o = parser.parse_args()
    count = o.prompts * o.k
    sizes = [f"train.online_batch={count}", f"train.update_size={count // 2}"]
    settings = [f"algo.name={o.algo}", "data.eval=null", f"rollout.k={o.k}", f"rollout.max_new_tokens={o.tokens}"]
    config = load("quickstart", [*settings, *sizes, "rollout.log_probs=recomputed"])
    engine = Engine.load(config)
    sampler = rollout.build(config.rollout, engine.policy, engine.tokenizer)
    stream = load_stream(config, engine, print)[: o.prompts]
    requests = [Request(g, r.prompt, r.prompt_ids) for g, r in enumerate(stream)]  # type: ignore[union-attr]
    online_batch(config, engine, sampler, requests, 0, reward, Clock())
    clock = Clock()
    b = online_batch(config, engine, sampler, requests, 1, reward, clock)
    tables: dict[str, list[str]] = {}

    @contextmanager
    def profiled(phase: str) -> Iterator[None]:
        cuda = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
        with profile(activities=[ProfilerActivity.CPU, *cuda]) as found:
            yield
        key = "self_cuda_time_total" if cuda else "self_cpu_time_total"
        listing = found.key_averages().table(key, row_limit=o.operators, max_name_column_width=44)
        tables.setdefault(phase, []).append(listing)

    online_batch(config, engine, sampler, requests, 2, reward, profiled)
    for phase, listings in tables.items():
        print(f"\n=== {phase}: {clock.seconds[phase]:.2f} s without the profiler ===")
        print(*listings, sep="\n")
    tokens, total = sum(len(row.rollout.completion_ids) for row in b.rows), sum(clock.seconds.values())
    print(f"{o.algo}, {o.prompts} prompts x {o.k} completions, {tokens} tokens, {torch.get_num_threads()} threads")
    for phase, seconds in clock.seconds.items():
        print(f"{phase:>10} {seconds:7.2f} s {seconds / total:6.1%}")
    print(f"{'all':>10} {total:7.2f} s {tokens / total:7.1f} useful tokens/s")


if __name__ == "__main__":
    main()
