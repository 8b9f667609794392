"""Held-out reward, KL, length: what a policy is worth on prompts that it was not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualign.annotate.normalised import unnormalised
from dualign.common.intervals import all_equal, half_width, none_for_nan
from dualign.config import Config
from dualign.models.divergence import Divergence
from dualign.models.packing import Tokens
from dualign.rollout.base import Request, Sampling
from dualign.run.batch import Row, labelled, tokens_of
from dualign.run.metrics import distinct
from dualign.training.clock import Clock
from dualign.training.engine import Engine
from dualign.training.labeller import Labeller
from dualign.training.source import penalised

SEED_SHIFT = 0x4E5A_1D07  # batch numbers of held-out sampling: no training batch has them


@dataclass(frozen=True)
class HeldOut:
    """Means over prompts with 95 % t-intervals' half widths (None: there is none). `kl`: mean of log π_θ/π_0 over the
    completions (or, by eval.kl, of its expectation at each token), nats each; that is KL(π_θ‖π_0) where they are sampled
    at temperature 1 and top-p 1."""

    batches: int
    prompts: int  # that have a label
    reward: float
    reward_ci: float | None
    reward_sd: float  # over completions
    kl: float
    kl_ci: float | None
    length: float
    truncated: float  # share of completions that were cut off
    absent: float  # share of completions without a label
    seconds: float
    distinct: float | None = None  # share of completions that differ; one answer to every prompt: 1/n
    asked: int | None = None  # prompts that were sampled on; None, here and below: a run of before does not say
    temperature: float | None = None
    top_p: float | None = None
    rewards: dict[str, float] | None = None  # the mean of each, where there are several

    def record(self) -> dict[str, Any]:
        return none_for_nan(asdict(self))


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
    rows = engine.processes.everyones(lambda: labeller.rows(engine.processes.mine(chosen), sampling, seed, clock))
    b = labelled(done, [replace(row, label=unnormalised(row.label)) for row in rows])
    every = tokens_of(b.rows)  # how far the policy is from π_0 needs no label
    with clock("score"):
        apart_NT = torch.zeros(len(every), 1) if at_pi_0(config, done) else apart(config, engine, every)
    gap = apart_NT.double().sum(-1).numpy()
    reward = b.batch.reward_N.numpy()
    per_prompt = by_group(reward, b.tokens.group)
    kl = by_group(gap, every.group)
    result = HeldOut(
        batches=done,
        prompts=len(per_prompt),
        reward=float(per_prompt.mean()) if len(per_prompt) else float("nan"),
        reward_ci=half_width(per_prompt),
        reward_sd=float(reward.std(ddof=1)) if len(reward) > 1 else 0.0,
        kl=float(kl.mean()) if len(kl) else float("nan"),
        kl_ci=0.0 if at_pi_0(config, done) else half_width(kl),  # π_0 is exactly π_0
        length=float(np.mean([len(row.rollout.completion_ids) for row in b.rows])),
        truncated=float(np.mean([row.rollout.finish == "length" for row in b.rows])),
        absent=b.absent / len(b.rows),
        seconds=sum(clock.seconds.values()),
        distinct=distinct([row.rollout.text for row in b.rows]),
        asked=len(chosen),
        temperature=temperature,
        top_p=r.top_p,
        rewards=means_of(b.rows),
    )
    return result, list(b.rows)


def apart(config: Config, engine: Engine, tokens: Tokens) -> Tensor:
    """(N, T): log π_θ/π_0 of each token, or with eval.kl=exact the KL of the distributions that it was drawn from."""
    if config.eval.kl == "exact":
        return engine.score(Divergence(engine.policy, engine.reference), tokens)
    return engine.score(engine.policy, tokens) - engine.score_reference(tokens)


def means_of(rows: Sequence[Row]) -> dict[str, float] | None:
    """Each reward's own mean over prompts, by name; None where there is one alone."""
    names = sorted({name for row in rows for name in row.label.parts or {}})
    if len(names) < 2:
        return None
    found = {name: by_prompt(rows, part_of_label(name)).values() for name in names}
    return {name: float(np.mean([np.mean(each) for each in values])) for name, values in found.items() if values}


def at_pi_0(config: Config, done: int) -> bool:
    """Whether the policy is still π_0 itself, so that nothing between the two is to be measured."""
    return done == 0 and config.model.reference is None


def kl_name(sampling: Mapping[str, Any]) -> str:
    """What to call the mean of log π/π_0 over completions by their `temperature` and `top_p`: an estimate of KL(π‖π_0)
    only where they are drawn from π as it is, neither sharpened nor cut. A run of before does not say."""
    temperature, top_p = sampling.get("temperature"), sampling.get("top_p")
    if temperature is None:
        return "log(π/π_0) of its samples"
    if temperature == 0:
        return "log(π/π_0) (greedy)"
    if temperature == top_p == 1:
        return "KL to π_0"
    return f"log(π/π_0) (T={temperature:g}{f', top-p={top_p:g}' if top_p != 1 else ''})"


def by_group(values: np.ndarray, group: Sequence[int]) -> np.ndarray:
    """Mean per prompt, in prompt order."""
    groups = np.asarray(group)
    return np.array([values[groups == g].mean() for g in np.unique(groups)])


Value = Callable[[Row], float | None]


def gains(before: Sequence[Row], after: Sequence[Row], penalty: float) -> dict[str, Any]:
    """What a run's summary says of the held-out reward: its `gain`; with a missing-EOS penalty, also that of the reward
    as it was trained on (`trained`); with several rewards, also that of each (`rewards`)."""
    found: dict[str, Any] = gain(before, after)
    if penalty:
        found["trained"] = change(before, after, lambda row: penalised(row, penalty).label.value)
    names = sorted({name for row in before for name in row.label.parts or {}})
    if len(names) > 1:
        found["rewards"] = {name: change(before, after, part_of_label(name)) for name in names}
    return found


def change(before: Sequence[Row], after: Sequence[Row], value: Value) -> dict[str, float | int | None]:
    """`gain`, and the means that it lies between."""
    means = []
    for rows in (before, after):
        per_prompt = [float(np.mean(values)) for values in by_prompt(rows, value).values()]
        means.append(float(np.mean(per_prompt)) if per_prompt else float("nan"))
    return none_for_nan(dict(zip(("before", "after"), means, strict=True))) | gain(before, after, value)


def gain(
    before: Sequence[Row], after: Sequence[Row], value: Value = lambda row: row.label.value
) -> dict[str, float | int | None]:
    """The paired difference of reward over the `n` prompts that have a label before and after, with half its 95 %
    interval, also in standard deviations of π_0's rewards. None: it does not exist (no such prompt; one prompt or equal
    differences have no interval; equal rewards of π_0 have no standard deviation)."""
    start, end = (by_prompt(rows, value) for rows in (before, after))
    shared = sorted(set(start) & set(end))
    pairs = np.array([(np.mean(start[g]), np.mean(end[g])) for g in shared]).reshape(-1, 2)
    difference = pairs[:, 1] - pairs[:, 0]
    rounding = 8 * np.finfo(float).eps * np.abs(pairs).sum(1)
    difference[np.abs(difference) <= rounding] = 0.0
    every = np.array([v for g in start for v in start[g]])
    sd = float(every.std(ddof=1)) if len(every) > 1 and not all_equal(every) else 0.0
    mean, half = (float(difference.mean()) if len(shared) else float("nan")), half_width(difference)
    measured = {
        "gain": mean,
        "gain_ci": half,
        "sd": sd,
        "gain_sd": mean / sd if sd else float("nan"),
        "gain_sd_ci": half / sd if sd else float("nan"),
    }
    return none_for_nan(measured) | {"n": len(shared)}


def part_of_label(name: str) -> Value:
    return lambda row: (row.label.parts or {}).get(name)


def by_prompt(rows: Sequence[Row], value: Value) -> dict[str, list[float]]:
    """By what the prompt is, not by its place: of a run that a version before began, places may differ."""
    out: dict[str, list[float]] = {}
    for row in rows:
        if (v := value(row)) is not None:
            out.setdefault(key_of(row), []).append(v)
    return out


def key_of(row: Row) -> str:
    prompt = row.rollout.prompt
    return json.dumps([prompt.id, prompt.content])
