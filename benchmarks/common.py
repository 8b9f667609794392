"""What the benchmarks share: the machine's description, results as files, arithmetic, and one online batch by phase."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a parent that only starts others stays small: torch is imported where it is needed
    from dualign.common.types import Rollout
    from dualign.config import Config
    from dualign.rollout.base import Request, Sampler
    from dualign.run.batch import WeightedBatch
    from dualign.training.engine import Engine

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("dualign", "torch", "transformers", "accelerate", "trl")
SETTINGS = ("OMP_", "MKL_", "KMP_", "GOMP_", "ONEDNN_", "LRU_CACHE_")  # of threads and kernels, in the environment


def machine() -> dict[str, Any]:
    """What a figure must be read with. `load` is the 1-minute average at the start: on a quiet machine below 0.5."""
    info, memory = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    named = [x for x in info.read_text().splitlines() if x.startswith("model name")] if info.exists() else []
    total = int(memory.read_text().split()[1]) / 2**20 if memory.exists() else None
    return {
        "cpu": named[0].partition(":")[2].strip() if named else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": total and round(total, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 2),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(SETTINGS)},
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def save(name: str, record: dict[str, Any], tables: str, folder: Path = RESULTS) -> Path:
    """Writes <date>-<name>.json and .md (the tables under the machine's description); returns the latter."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / f"{date.today().isoformat()}-{name}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    about = "\n".join(f"- {key}: {value}" for key, value in record["machine"].items())
    page = stem.with_suffix(".md")
    page.write_text(f"# {name}, {date.today().isoformat()}\n\n{about}\n\n{tables}\n", encoding="utf-8")
    return page


def spread(values: Sequence[float], digits: int = 2) -> str:
    """median (min-max)"""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def forward_flops(config: Any, pairs: Sequence[tuple[int, Sequence[int]]]) -> float:
    """FLOPs of one forward pass of a Llama-like model. `pairs`: per prompt its tokens and those of its completions.
    The least that is needed: each prompt once, logits at completion positions only, no padding."""
    d = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    q, kv = config.num_attention_heads * d, config.num_key_value_heads * d
    layer = config.hidden_size * (2 * q + 2 * kv + 3 * config.intermediate_size)
    scored = sum(sum(ends) for _, ends in pairs)
    tokens = scored + sum(p for p, _ in pairs)
    seen = sum(p * (p + 1) / 2 + sum(c * p + c * (c + 1) / 2 for c in ends) for p, ends in pairs)
    return 2.0 * scored * config.hidden_size * config.vocab_size + config.num_hidden_layers * (
        2.0 * tokens * layer + 4.0 * seen * q
    )


def pairs_of(b: WeightedBatch) -> list[tuple[int, list[int]]]:
    """A batch's prompt and completion lengths, as `forward_flops` reads them."""
    found: dict[int, tuple[int, list[int]]] = {}
    for row in b.rows:
        r = row.rollout
        found.setdefault(r.group, (len(r.prompt_ids), []))[1].append(len(r.completion_ids))
    return list(found.values())


DTYPES = {"bf16": "bfloat16", "fp32": "float32"}  # their names in torch


def matmul_rate(
    shapes: Sequence[tuple[int, int, int]], device: str = "cpu", seconds: float = 1.0, dtype: str = "bfloat16"
) -> float:
    """FLOP/s of products (n, k) @ (k, m), all shapes one after the other: the best of repeats within `seconds`."""
    import time

    import torch

    kind = {"dtype": getattr(torch, dtype), "device": device}
    operands = [(torch.randn(n, k, **kind), torch.randn(k, m, **kind)) for n, k, m in shapes]
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        for a, b in operands:
            torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return sum(2.0 * n * k * m for n, k, m in shapes) / best


Phase = Callable[[str], AbstractContextManager[None]]


def online_batch(
    config: Config,
    engine: Engine,
    sampler: Sampler,
    requests: Sequence[Request],
    step: int,
    reward: Callable[[Rollout], float],
    phase: Phase,
) -> WeightedBatch:
    """What the trainer does with one online batch, without files and labels' waiting, each part within `phase`."""
    from dualign.common.types import Label
    from dualign.rollout.base import Sampling
    from dualign.run.batch import Row, labelled, updates, weigh
    from dualign.training.first_pass import FirstPass

    r, seed = config.rollout, config.run.seed
    rollouts: list[Rollout] = []
    engine.free_memory()
    with phase("sample"):
        sampler.sample(requests, Sampling(r.k, r.max_new_tokens, r.temperature, r.top_p), (seed, step), rollouts.append)
    b = labelled(step, [Row(rollout, Label(reward(rollout))) for rollout in rollouts])
    with phase("score π_0"):
        ref_NT = engine.score_reference(b.tokens)
    named = {"score": "score π_t"}
    first_pass = FirstPass(config, engine)
    old_NT = first_pass.log_pi_t(b, ref_NT, None, lambda name: phase(named.get(name, name)))
    b = weigh(b, config.algo, old_NT, ref_NT, None)
    with phase("update"):
        for u, (tokens, rows) in enumerate(updates(b, config.algo, config.train.update_size, seed)):
            engine.update(config.algo, tokens, rows, first_pass.begun(step, u))
    with phase("sync"):
        sampler.sync(engine.weights)
    return b
