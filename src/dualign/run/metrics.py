"""What a run writes down of each online batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dualign.common.errors import UserError
from dualign.run.batch import PENALTY, WeightedBatch, recorded_logp
from dualign.run.manifest import Manifest

OLD_NAMES = {"missing_eos": "truncated"}


def new_names(record: dict[str, Any]) -> dict[str, Any]:
    """A record of a run of before, by the names that its numbers have now."""
    return {OLD_NAMES.get(key, key): value for key, value in record.items()}


def batch_record(b: WeightedBatch, losses: list[dict[str, float]], online: bool) -> dict[str, Any]:
    """One line of metrics.jsonl: what was sampled, how it was rewarded and weighted, and how the updates went."""
    batch = b.batch
    lengths = [len(row.rollout.completion_ids) for row in b.rows]
    rewarded: dict[str, Any] = {
        "reward": float(batch.reward_N.mean()) if len(batch) else None,
        "reward_std": float(batch.reward_N.std()) if len(batch) > 1 else 0.0,
    }
    record: dict[str, Any] = {
        "step": b.step,
        **(rewarded if online else {}),  # a fixed set has none: its 1 and 0 say which answer was chosen
        "length": float(np.mean(lengths)),
        "truncated": float(np.mean([row.rollout.finish == "length" for row in b.rows])),
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
    if online and (gap := b.gap) is not None:
        record["kl"] = gap
        if (half := b.gap_ci) is not None:
            record["kl_ci"] = half
    if online and (nats := entropy(b)) is not None:
        record["entropy"] = nats
    if (sampled_NT := b.sampled_NT) is not None and any(row.rollout.sampler_logp for row in b.rows):
        gap_N = ((sampled_NT - recorded_logp(b)) * batch.mask_NT).sum(-1)
        record["sampler_gap"] = float(gap_N.abs().mean())  # 0 where log π_t is what was recorded
    for name in dict.fromkeys(name for loss in losses for name in loss):
        record[name] = float(np.mean([loss.get(name, 0.0) for loss in losses]))
    return record


def reuse_record(uses: Sequence[WeightedBatch]) -> dict[str, float]:
    """Of the earlier batches that were trained on again: how many, how far π_t has moved since they were sampled, and
    how their weights are spread; means over them. Nothing where there are none."""
    if not uses:
        return {}
    gaps = [float((u.batch.seq_old_N - u.batch.seq_behaviour_N).abs().mean()) for u in uses if len(u.batch)]
    record = {"reused": float(len(uses))} | ({"reused/log_ratio": float(np.mean(gaps))} if gaps else {})
    for name in ("ess", "clip_rate"):
        if found := [u.stats[name] for u in uses if name in u.stats]:
            record[f"reused/{name}"] = float(np.mean(found))
    return record


def entropy(b: WeightedBatch) -> float | None:
    """Nats a token: the mean of -log π over the tokens that were sampled from π, an estimate of its entropy where
    temperature and top-p are 1. None where log π is not known."""
    logp_NT = b.sampled_NT
    if logp_NT is None and any(row.rollout.sampler_logp for row in b.rows):
        logp_NT = recorded_logp(b)
    tokens = float(b.batch.mask_NT.sum())
    return None if logp_NT is None or not tokens else -float((logp_NT * b.batch.mask_NT).double().sum()) / tokens


def distinct(completions: Sequence[str]) -> float:
    """The share of completions that differ: a policy that gives every prompt the one answer that a reward likes most
    has a high reward and almost none."""
    return len(set(completions)) / len(completions) if completions else float("nan")


class MetricsFile:
    """metrics.jsonl: a line for each finished online batch, synced as it is written."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path, self.manifest = path, manifest

    @cached_property
    def _sha(self) -> Any:
        """Of what is there, before the first line is added; who only reads needs none."""
        return hashlib.sha256(self.path.read_bytes() if self.path.exists() else b"")

    def add(self, record: dict[str, Any]) -> None:
        line = (json.dumps(record) + "\n").encode()
        self._sha.update(line)
        self.manifest.put({self.path: self._sha.hexdigest()})
        try:
            with open(self.path, "ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}. Make room and resume") from None

    def read(self) -> list[dict[str, Any]]:
        """The records. A line cut off by a kill is the last one, and its batch is replayed. Raises UserError for any
        other that cannot be read."""
        if not self.path.exists():
            return []
        *whole, _torn = self.path.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(whole, 1):
            try:
                records.append(new_names(json.loads(line)))
            except ValueError:
                raise UserError(
                    f"{self.path}, line {number}: damaged. Delete the file: `dualign resume` "
                    "replays the stored batches and writes it again"
                ) from None
        return records
