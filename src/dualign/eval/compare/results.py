"""What finished runs hold, read back: summaries, curves, and means over seeds with 95 % t-intervals."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from dualign.algos import Algorithm
from dualign.common.errors import UserError
from dualign.common.intervals import all_equal, half_width, too_few
from dualign.config import Config
from dualign.eval.compare.grid import Cell
from dualign.run.folder import Run
from dualign.run.metrics import distinct, new_names
from dualign.training.heldout import kl_name


@dataclass(frozen=True)
class Point:
    """The policy after some online batches, on held-out prompts."""

    batches: int
    labels: int  # bought so far; of a fixed set: 0
    seconds: float  # of training so far, at the run's median batch: a suspended machine is no training
    reward: float
    kl: float  # mean of log π_θ/π_0, nats per completion: KL(π_θ‖π_0) at temperature 1
    kl_interpolated: float  # α times that: what DAR's objective charges at π_θ = π_t; no α: the whole of it
    length: float  # tokens
    missing_eos: float  # share
    distinct: float  # share of different completions
    prompts: int = 0  # that have a label
    rewards: Mapping[str, float] = field(default_factory=dict)  # the mean of each, where there are several


@dataclass(frozen=True)
class Result:
    """One finished cell."""

    cell: Cell
    summary: dict[str, Any]
    curve: tuple[Point, ...]
    batch_seconds: float  # median over online batches
    measure: str | None = None  # which of several rewards the points' is

    @property
    def gain_sd(self) -> float | None:
        gain = self.summary.get("rewards", {}).get(self.measure, {}) if self.measure else self.summary
        return gain.get("gain_sd")

    @property
    def online(self) -> bool:
        return is_online(self.cell.config)

    @property
    def last(self) -> Point | None:
        return self.curve[-1] if self.curve else None


@dataclass(frozen=True)
class Mean:
    """Over seeds, with half the width of the 95 % t-interval (nan for one seed: it has none)."""

    value: float
    half: float
    n: int

    @staticmethod
    def of(values: Iterable[float | None], counted: bool = False) -> Mean | None:
        """None where there is no value. What is `counted`, not measured, has an interval of no width where seeds agree;
        else equal values have none."""
        known = np.array([v for v in values if v is not None and np.isfinite(v)], dtype=float)
        if not len(known):
            return None
        half = 0.0 if counted and len(known) > 1 and all_equal(known) else half_width(known)
        return Mean(float(known.mean()), half, len(known))


def is_online(config: Config) -> bool:
    """Whether the run buys labels, rather than reading a fixed set."""
    algo: Algorithm = config.algo
    return algo.source == "online"


def final(folder: Path, measure: str | None = None) -> tuple[float, float] | None:
    """The reward that a run ended with (by `measure`, one of several), and the share of different completions it was
    measured on; None where it did not end, or measured none."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    after = json.loads(path.read_text(encoding="utf-8")).get("after", {})
    reward = (after.get("rewards") or {}).get(measure) if measure else after.get("reward")
    if reward is None or not np.isfinite(reward):
        return None
    return reward, _distinct(Run.open(folder).evaluation_path(after["batches"]))


def _distinct(path: Path) -> float:
    import pyarrow.parquet as pq

    return distinct(pq.read_table(path, columns=["completion"])["completion"].to_pylist())


def read(cell: Cell, measure: str | None = None) -> Result | None:
    """A finished cell's numbers, its reward by `measure`; None if it is not finished."""
    path = cell.folder / "summary.json"
    if not path.is_file():
        return None
    run = Run.open(cell.folder)
    # of a batch that was collected before an interruption, a part of the time is not known
    spent = [sum(m["seconds"].values()) for m in run.metrics() if "write" in m["seconds"]]
    median = float(np.median(spent)) if spent else float("nan")
    labels = [record["labels"] if is_online(cell.config) else 0 for record in run.metrics()]
    alpha = float(getattr(cell.config.algo, "alpha", 1.0))
    curve = tuple(_points(run, [0, *labels], median, alpha, measure))
    return Result(cell, json.loads(path.read_text(encoding="utf-8")), curve, median, measure)


def _points(run: Run, labels: Sequence[int], seconds: float, alpha: float, measure: str | None) -> Iterable[Point]:
    import pyarrow.parquet as pq

    for path in sorted(run.evaluations_dir.glob("*.parquet")):
        e = new_names(json.loads(pq.read_schema(path).metadata[b"dualign"])["stats"])
        done = e["batches"]
        if "reward" not in e:  # a fixed set's loss, margin, accuracy
            continue
        measured = {key: e[key] for key in ("reward", "kl", "length")} | {"missing_eos": e["truncated"]}
        rewards = e.get("rewards") or {}
        if measure is not None:
            if measure not in rewards:
                raise UserError(f"{path}: has no mean of a reward {measure!r}, which the grid measures")
            measured["reward"] = rewards[measure]
        measured |= {"rewards": rewards, "kl_interpolated": alpha * e["kl"], "distinct": _distinct(path)}
        yield Point(done, labels[done], seconds * done, prompts=e["prompts"], **measured)


def groups(results: Sequence[Result]) -> dict[tuple[str, str | None, str], list[Result]]:
    """Results that differ in the seed alone, by (system, axis, value), in the grid's order."""
    found: dict[tuple[str, str | None, str], list[Result]] = {}
    for r in results:
        found.setdefault((r.cell.system, r.cell.axis, str(r.cell.value)), []).append(r)
    return found


def along_axes(results: Sequence[Result]) -> dict[tuple[str, str], list[Result]]:
    """Results by (system, axis), of those that have an axis."""
    found: dict[tuple[str, str], list[Result]] = {}
    for r in results:
        if r.cell.axis is not None:
            found.setdefault((r.cell.system, r.cell.axis), []).append(r)
    return found


def mean_curve(seeds: Sequence[Result]) -> list[tuple[Point, Mean]]:
    """The mean point of all seeds after the same number of online batches, and the reward's interval."""
    by_batches: dict[int, list[Point]] = {}
    for r in seeds:
        for p in r.curve:
            by_batches.setdefault(p.batches, []).append(p)
    out = []
    for batches, points in sorted(by_batches.items()):
        reward = Mean.of(p.reward for p in points)
        if reward is not None and len(points) == len(seeds):
            rest = ("seconds", "kl", "kl_interpolated", "length", "missing_eos", "distinct")
            means: dict[str, Any] = {key: float(np.mean([getattr(p, key) for p in points])) for key in rest}
            labels, prompts = round(np.mean([p.labels for p in points])), min(p.prompts for p in points)
            point = Point(batches=batches, labels=labels, reward=reward.value, prompts=prompts, **means)
            out.append((point, reward))
    return out


def finals(results: Sequence[Result]) -> list[Point]:
    """The mean final point over seeds of each setting."""
    curves = (mean_curve([r for r in seeds if r.last]) for seeds in groups(results).values())
    return [curve[-1][0] for curve in curves if curve]


def distances(results: Iterable[Result]) -> tuple[str, str]:
    """What `Point.kl` and `kl_interpolated` are, by how the evaluations sampled."""
    names = set()
    for r in results:
        rollout, temperature = r.cell.config.rollout, r.cell.config.eval.temperature
        how = {"temperature": rollout.temperature if temperature is None else temperature, "top_p": rollout.top_p}
        names.add(kl_name(how))
    name = names.pop() if len(names) == 1 else kl_name({})
    return (
        ("KL(π_θ‖π_0)", "α-interpolated KL") if name == kl_name({"temperature": 1, "top_p": 1}) else (name, f"α·{name}")
    )


def too_few_prompts(results: Iterable[Result]) -> str:
    """Why nothing is said of differences between these results; empty where each rests on prompts enough."""
    return too_few(min((r.last.prompts for r in results if r.last), default=0))


def chance(settings: Iterable[Sequence[float]]) -> float | None:
    """How probable it is that values of settings that are all alike differ as much as these, each list one setting's
    over seeds: one-way analysis of variance (for two settings, the t-test). None where no setting has two seeds that
    differ: then nothing tells how much seeds do."""
    known = [np.array(values, dtype=float) for values in settings if len(values)]
    if len(known) < 2 or all(all_equal(values) for values in known):
        return None
    p = float(stats.f_oneway(*known).pvalue)
    return p if np.isfinite(p) else None


def reward_at(curve: Sequence[Point], kl: float) -> float | None:
    """The reward where the curve first comes to KL(π_θ‖π_0) = `kl`, linear between evaluations; None if it never does."""
    for before, after in pairwise(curve):
        if before.kl <= kl <= after.kl and after.kl > before.kl:
            share = (kl - before.kl) / (after.kl - before.kl)
            return before.reward + share * (after.reward - before.reward)
    return None


def labels_to_reach(curve: Sequence[Point], target: float) -> float | None:
    """Labels at which the curve first reaches `target`, linear between evaluations; None if it never does."""
    for before, after in pairwise(curve):
        if before.reward >= target:
            return float(before.labels)
        if after.reward >= target:
            share = (target - before.reward) / (after.reward - before.reward)
            return before.labels + share * (after.labels - before.labels)
    return float(curve[-1].labels) if curve and curve[-1].reward >= target else None
