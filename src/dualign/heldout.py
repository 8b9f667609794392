"""Held-out reward, KL, length: what a policy is worth on prompts that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from dualign.batch import Row, labelled
from dualign.config import Config
from dualign.engine import Engine
from dualign.rollout.base import Request, Sampling
from dualign.source import Clock, Labeller, everyones, penalised

SEED_SHIFT = 0x4E5A_1D07  # batch numbers of held-out sampling: no training batch has them


@dataclass(frozen=True)
class HeldOut:
    """Means over prompts with 95 % t-intervals' half widths; KL(π_θ‖π_0) in nats per completion, by sampling."""

    batches: int
    prompts: int
    reward: float
    reward_ci: float
    reward_sd: float  # over completions
    kl: float
    kl_ci: float
    length: float
    missing_eos: float
    absent: float
    seconds: float
    distinct: float = float("nan")  # share of completions that differ; one answer to every prompt: 1/n

    def record(self) -> dict[str, Any]:
        return asdict(self)


def evaluate(
    config: Config, engine: Engine, labeller: Labeller, requests: Sequence[Request], done: int
) -> tuple[HeldOut, list[Row]]:
    """Samples from π_t as it stands, always with the same random numbers, so that two evaluations are paired."""
    e, r = config.eval, config.rollout
    temperature = r.temperature if e.temperature is None else e.temperature
    sampling = Sampling(e.k, r.max_new_tokens, temperature, r.top_p)
    chosen = [Request(g, q.prompt, q.prompt_ids) for g, q in enumerate(requests[: e.prompts])]
    clock = Clock()
    seed = (config.run.seed, SEED_SHIFT)
    rows = everyones(engine, lambda: labeller.rows(engine.mine(chosen), sampling, seed, clock))
    b = labelled(done, rows)
    with clock("score"):
        if done == 0:
            gap = np.zeros(len(b.tokens))
        else:
            policy_NT, reference_NT = engine.score(engine.policy, b.tokens), engine.score_reference(b.tokens)
            gap = (policy_NT - reference_NT).double().sum(-1).numpy()
    reward = b.batch.reward_N.numpy()
    per_prompt = by_group(reward, b.tokens.group)
    kl = by_group(gap, b.tokens.group)
    result = HeldOut(
        batches=done,
        prompts=len(per_prompt),
        reward=float(per_prompt.mean()) if len(per_prompt) else float("nan"),
        reward_ci=half_width(per_prompt),
        reward_sd=float(reward.std(ddof=1)) if len(reward) > 1 else 0.0,
        kl=float(kl.mean()) if len(kl) else float("nan"),
        kl_ci=half_width(kl),
        length=float(np.mean([len(row.rollout.completion_ids) for row in b.rows])),
        missing_eos=float(np.mean([row.rollout.finish == "length" for row in b.rows])),
        absent=b.absent / len(b.rows),
        seconds=sum(clock.seconds.values()),
        distinct=distinct([row.rollout.text for row in b.rows]),
    )
    return result, list(b.rows)


def distinct(completions: Sequence[str]) -> float:
    """The share of completions that differ: a policy that gives every prompt the one answer that a reward likes most
    has a high reward and almost none."""
    return len(set(completions)) / len(completions) if completions else float("nan")


def by_group(values: np.ndarray, group: Sequence[int]) -> np.ndarray:
    """Mean per prompt, in prompt order."""
    groups = np.asarray(group)
    return np.array([values[groups == g].mean() for g in np.unique(groups)])


def half_width(values: np.ndarray) -> float:
    """Half the width of the 95 % t-interval of the mean; NaN for a single value, which has none."""
    if len(values) < 2:
        return float("nan")
    return float(stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / np.sqrt(len(values)))


Value = Callable[[Row], float | None]


def gains(before: Sequence[Row], after: Sequence[Row], penalty: float) -> dict[str, Any]:
    """What a run's summary says of the held-out reward: its `gain`; with a missing-EOS penalty, also that of the reward
    as it was trained on (`trained`); with several rewards, also that of each (`rewards`)."""
    found: dict[str, Any] = gain(before, after)
    if penalty:
        found["trained"] = change(before, after, lambda row: penalised(row, penalty).label.value)
    names = sorted({name for row in before for name in row.label.parts or {}})
    if len(names) > 1:
        found["rewards"] = {name: change(before, after, _part(name)) for name in names}
    return found


def change(before: Sequence[Row], after: Sequence[Row], value: Value) -> dict[str, float]:
    """`gain`, and the means that it lies between."""
    means = []
    for rows in (before, after):
        per_prompt = [float(np.mean(values)) for values in _by_prompt(rows, value).values()]
        means.append(float(np.mean(per_prompt)) if per_prompt else float("nan"))
    return dict(zip(("before", "after"), means, strict=True)) | gain(before, after, value)


def gain(before: Sequence[Row], after: Sequence[Row], value: Value = lambda row: row.label.value) -> dict[str, float]:
    """The paired difference of reward per prompt, with its 95 % interval, also in standard deviations of π_0's rewards."""
    start, end = (_by_prompt(rows, value) for rows in (before, after))
    shared = sorted(set(start) & set(end))
    difference = np.array([np.mean(end[g]) - np.mean(start[g]) for g in shared])
    every = np.array([v for g in start for v in start[g]])
    sd = float(every.std(ddof=1)) if len(every) > 1 else 0.0
    mean, half = (float(difference.mean()), half_width(difference)) if len(shared) else (float("nan"), 0.0)
    return {
        "gain": mean,
        "gain_ci": half,
        "sd": sd,
        "gain_sd": mean / sd if sd else 0.0,
        "gain_sd_ci": half / sd if sd else 0.0,
    }


def _part(name: str) -> Value:
    return lambda row: (row.label.parts or {}).get(name)


def _by_prompt(rows: Sequence[Row], value: Value) -> dict[int, list[float]]:
    out: dict[int, list[float]] = {}
    for row in rows:
        if (v := value(row)) is not None:
            out.setdefault(row.rollout.group, []).append(v)
    return out
