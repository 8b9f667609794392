"""What a run writes down of each online batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dualign.run.batch import PENALTY, WeightedBatch, recorded_logp


def batch_record(b: WeightedBatch, losses: list[dict[str, float]]) -> dict[str, Any]:
    """One line of metrics.jsonl: what was sampled, how it was rewarded and weighted, and how the updates went."""
    batch = b.batch
    lengths = [len(row.rollout.completion_ids) for row in b.rows]
    sampled = any(row.rollout.sampler_logp for row in b.rows)
    rewarded: dict[str, Any] = {
        "reward": float(batch.reward_N.mean()) if len(batch) else None,
        "reward_std": float(batch.reward_N.std()) if len(batch) > 1 else 0.0,
    }
    record: dict[str, Any] = {
        "step": b.step,
        **(rewarded if sampled else {}),  # a fixed set has none: its 1 and 0 say which answer was chosen
        "length": float(np.mean(lengths)),
        "missing_eos": float(np.mean([row.rollout.finish == "length" for row in b.rows])),
        "distinct": distinct([row.rollout.text for row in b.rows]),
        "absent": b.absent,
        **b.stats,
    }
    if any(PENALTY in row.label.parts for row in b.rows):
        own = [v - (row.label.parts.get(PENALTY) or 0.0) for row in b.rows if (v := row.label.value) is not None]
        record["reward_unpenalised"] = float(np.mean(own))
    rewards = {name for row in b.rows for name in row.label.parts} - {PENALTY}
    for name in sorted(rewards) if len(rewards) > 1 else ():  # from the rows, so that a replay agrees
        given = [row.label.parts[name] for row in b.rows if name in row.label.parts]  # of the rows that it applies to
        labels = [value for value in given if value is not None]
        record[f"{name}/absent"] = 1 - len(labels) / len(given)
        record[f"{name}/mean"] = float(np.mean(labels)) if labels else None
    if sampled and (gap := b.gap) is not None:
        record["kl"] = gap
    if batch.logp_old_NT is not None and sampled:
        gap_N = ((batch.logp_old_NT - recorded_logp(b)) * batch.mask_NT).sum(-1)
        record["sampler_gap"] = float(gap_N.abs().mean())  # 0 where log π_t is what was recorded
    for name in dict.fromkeys(name for loss in losses for name in loss):
        record[name] = float(np.mean([loss.get(name, 0.0) for loss in losses]))
    return record


def distinct(completions: Sequence[str]) -> float:
    """The share of completions that differ: a policy that gives every prompt the one answer that a reward likes most
    has a high reward and almost none."""
    return len(set(completions)) / len(completions) if completions else float("nan")
