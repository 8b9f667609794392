"""Run folders as training leaves them, written directly: no model, no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

MARKUP = '</script><script>document.title="owned"</script><img src=x onerror="document.title=\'owned\'"><b>bold</b>'
CONTROLS = "bell\x07 escape\x1b[31m null\x00 bidi \u202egnitirw\u202c zero\u200bwidth"
LONG = "x" * 1_000_000
HOSTILE = (MARKUP, CONTROLS, LONG, "line\n" * 3000)


def write_batch(path: Path, step: int, texts: Sequence[str], k: int, stats: dict[str, Any] | None = None) -> pa.Table:
    """A batch, or with `stats` an evaluation: `texts` in groups of `k`. Rewards, weights and notes follow from the place."""
    n = len(texts)
    at = np.arange(n)
    reward = [None if i % 11 == 10 else round(float(np.sin(i + step)), 3) for i in at]
    columns: dict[str, Any] = {
        "index": pa.array(at, pa.int32()),
        "group": pa.array(at // k, pa.int32()),
        "prompt_id": [f"p{i // k}" for i in at],
        "prompt": [json.dumps([{"role": "user", "content": f"Question {i // k} of batch {step}?"}]) for i in at],
        "columns": [json.dumps({"kind": "test"}) for _ in at],
        "completion": list(texts),
        "finish": ["length" if i % 5 == 4 else "eos" for i in at],
        "prompt_ids": pa.array([[1, 2]] * n, pa.list_(pa.int32())),
        "completion_ids": pa.array([[3] * (1 + i % 7) for i in at], pa.list_(pa.int32())),
        "sampler_logp": pa.array([[-1.0] * (1 + i % 7) for i in at], pa.list_(pa.float32())),
        "reward": pa.array(reward, pa.float64()),
        "absent": pa.array(["no score in the reply" if r is None else None for r in reward], pa.string()),
        "note": pa.array([f"[yes] short (weight 1): words of {i}" if i % 3 == 0 else None for i in at], pa.string()),
        "parts": [json.dumps({"helpful": None if r is None else r / 2, "brief": r}) for r in reward],
    }
    if stats is None:
        weight = [None if r is None else float(np.exp(r)) for r in reward]
        columns |= {
            "algo.advantage": pa.array(reward, pa.float32()),
            "algo.log_w_reg": pa.array([None if r is None else 0.0 for r in reward], pa.float32()),
            "algo.log_w_adv": pa.array(reward, pa.float32()),
            "algo.weight": pa.array(weight, pa.float32()),
            "algo.clipped": pa.array([None if w is None else w > 2 for w in weight], pa.bool_()),
            "algo.keep": pa.array([None if w is None else w > 0.4 for w in weight], pa.bool_()),
        }
    table = pa.table(columns).replace_schema_metadata({"dualign": json.dumps({"step": step, "stats": stats or {}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return table


def record(step: int) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "step": step, "reward": step / 10, "kl": step / 5, "kl_ci": 0.1, "ess": 0.3, "absent": 0,
        "labels": 8 * (step + 1), "helpful/mean": 0.1, "dollars": 0.25 * (step + 1), "seconds": {"sample": 1.0, "update": 2.0},
    }  # fmt: skip


def write_run(
    folder: Path, steps: int = 3, total: int = 4, finished: bool = False, k: int = 4, **settings: Any
) -> Path:
    """`steps` online batches of 8 completions, with an evaluation of π_0 and one after the last."""
    for inner in ("batches", "evaluations", "checkpoints"):
        (folder / inner).mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"name": "m"},
        "train": {"online_batches": total, "lr": 1e-5},
        "run": {"dir": str(folder), "seed": 0},
    }
    config["algo"] = {"name": "dar", "beta": 0.3} | settings
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(json.dumps({"format": 1, "begun": "2026-01-02T03:04:05+00:00"}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record(s)) + "\n" for s in range(steps)))
    (folder / ".lock").touch()
    for step in range(steps):
        texts = [f"answer {step}.{i} about {'apples' if i % 2 else 'Pears'}" for i in range(8)]
        write_batch(folder / f"batches/{step:06d}.parquet", step, texts, k)
    for done in (0, steps):
        stats = {"batches": done, "reward": done / 10, "reward_ci": 0.2, "kl": 0.0, "prompts": 4}
        stats["rewards"] = {"helpful": done / 20, "brief": -done / 10}
        texts = [f"held out {i} after {done} batches" for i in range(4)]
        write_batch(folder / f"evaluations/{done:06d}.parquet", done, texts, 1, stats)
    if finished:
        summary = {"algo": "dar", "gain": 0.5, "gain_ci": 0.1, "before": {"reward": 0.0}, "after": {"reward": 0.5}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder
