"""Simulated runs with a witness, many at a time: how often the test of `run/parting.py` speaks, and when."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from dualign.run import parting

Draw = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]
LOOKS = 9  # at batches after π_0's: 40 online batches, every 4th
HELD = 5  # evaluations after π_0's: every 8th


def normal(rng: Any, shape: Any) -> np.ndarray:
    return rng.standard_normal(shape)


def heavy(rng: Any, shape: Any) -> np.ndarray:
    return rng.standard_t(3, shape) / np.sqrt(3)


def skewed(rng: Any, shape: Any) -> np.ndarray:
    """Lognormal: skewness 6."""
    x = rng.lognormal(0, 1, shape)
    return (x - np.exp(0.5)) / np.sqrt((np.e - 1) * np.e)


def skewed_down(rng: Any, shape: Any) -> np.ndarray:
    return -skewed(rng, shape)


def scores(rng: Any, shape: Any) -> np.ndarray:
    """A judge's 1-10 that mostly says 8, 9 or 10."""
    return np.clip(np.round(8.7 + 1.5 * rng.standard_normal(shape)), 1, 10) / 1.5


def rare(rng: Any, shape: Any) -> np.ndarray:
    """One answer in twenty is bad."""
    return (rng.random(shape) < 0.05) / -0.22


@dataclass(frozen=True)
class Case:
    """What the labels of a prompt are, in standard deviations, by look (a share of the run from 0 to 1)."""

    name: str
    draw: Draw = normal
    witness: Callable[[float], float] = lambda at: 0.0
    reward: Callable[[float], float] = lambda at: 2.0 * (at > 0)
    prompts_0: int = 64
    prompts: int = 16
    heldout: int = 53
    absent: float = 0.0


CASES = (  # H0 holds in each: a run that speaks is a false alarm
    Case("witness flat, normal labels"),
    Case("witness rises", witness=lambda at: 0.5 * at),
    Case("witness rises and comes back", witness=lambda at: max(0.0, 2 * at * (1 - at))),
    Case("heavy tails (t, 3 degrees of freedom)", heavy),
    Case("skewed up (lognormal)", skewed),
    Case("skewed down (lognormal)", skewed_down),
    Case("a judge's 1-10, mostly 8 to 10", scores),
    Case("one bad answer in twenty", rare),
    Case("few prompts: 8 a batch, 20 held out", prompts_0=8, prompts=8, heldout=20),
    Case("few prompts, skewed up", skewed, prompts_0=8, prompts=8, heldout=20),
    Case("few prompts, skewed down", skewed_down, prompts_0=8, prompts=8, heldout=20),
    Case("a third of the labels absent", absent=1 / 3),
    Case("a third absent, skewed up", skewed, absent=1 / 3),
    Case("witness falls 1 sd, reward flat", witness=lambda at: -1.0 * (at > 0), reward=lambda at: 0.0),
    Case("both flat", reward=lambda at: 0.0),
)


def fallen(effect: float, gradual: bool, name: str = "", **more: Any) -> Case:
    """The witness falls by `effect` sd: at once after π_0, or evenly over the run."""
    fall = (lambda at: -effect * at) if gradual else (lambda at: -effect * (at > 0))
    return Case(name or f"falls {effect} sd {'over the run' if gradual else 'at once'}", witness=fall, **more)


def first_spoken(case: Case, runs: int, seed: int, alpha: float = 0.05) -> np.ndarray:
    """Of each of `runs` the share of the run at which it first spoke; nan where it never did."""
    rng = np.random.default_rng(seed)
    batch_looks = [((i + 1) / (LOOKS + 1), "batch") for i in range(LOOKS)]
    look_at = sorted(batch_looks + [((i + 1) / HELD, "held") for i in range(HELD if case.heldout else 0)])
    level = parting.level(alpha, 0.0, len(look_at))

    def labels(count: int, at: float) -> np.ndarray:
        x = case.draw(rng, (runs, count)) + case.witness(at)
        return np.where(rng.random(x.shape) < case.absent, np.nan, x)

    def rewards(count: int, at: float) -> np.ndarray:
        return rng.standard_normal((runs, count)) + case.reward(at)

    witness_0, reward_0 = labels(case.prompts_0, 0.0), rewards(case.prompts_0, 0.0)
    held_0 = labels(case.heldout, 0.0), rewards(case.heldout, 0.0)
    batches: list[tuple[np.ndarray, np.ndarray]] = []
    found = np.full(runs, np.nan)
    for at, kind in look_at:
        if kind == "held":
            p = parting.parted_pairs(labels(case.heldout, at), held_0[0], rewards(case.heldout, at), held_0[1])
        else:
            batches.append((labels(case.prompts, at), rewards(case.prompts, at)))
            window = batches[-(case.prompts_0 // case.prompts) :]
            p = parting.parted(
                np.concatenate([w for w, _ in window], 1),
                witness_0,
                np.concatenate([r for _, r in window], 1),
                reward_0,
            )
        found = np.where(np.isnan(found) & (p <= level), at, found)
    return found
