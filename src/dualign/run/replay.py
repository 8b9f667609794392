"""What follows from a run's stored batches alone: the weights once more, and what they would be under other settings.

No model and no label is asked for: rewards, log π_0 and log π_t are in the Parquet files.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualign import config as configs
from dualign.algos import Algorithm, Batch
from dualign.common.errors import UserError
from dualign.config import Config
from dualign.run.batch import WeightedBatch, labelled, recorded_logp, weigh
from dualign.run.folder import Run

EDGES = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 0.5, 1.0)  # of the histogram: weight as a share of the batch's largest


def stored(run: Run, uses: bool = False) -> Iterator[WeightedBatch]:
    """The batches of a run, in order; with `uses` each followed by those that were trained on again while it was.
    Raises UserError where there is none, or one is damaged."""
    steps = sorted(int(path.stem) for path in run.batches.glob("*.parquet"))
    if not steps:
        raise UserError(f"{run.folder}: no online batch is stored yet")
    for step in steps:
        b = run.read_batch(step)
        assert b is not None
        yield b
        for of in run.reused(step) if uses else ():
            use = run.read_reused(step, of)
            if use is None:
                raise UserError(f"{run.reused_path(step, of)}: missing; `dualign verify {run.folder}` says what to do")
            yield use


def again(b: WeightedBatch, algo: Algorithm) -> WeightedBatch:
    """The batch weighted by `algo` from what was sampled, labelled and scored. Raises UserError where it needs a score
    that was not stored, or cannot take what another policy than π_t sampled."""
    if b.batch.logp_behaviour_NT is not None and not algo.off_policy:
        raise UserError(f"online batch {b.step} was sampled by an older policy than π_t, and {algo.name} wants its own")
    have = b.batch
    needed = {
        "log π_0": (algo.needs_ref, have.logp_ref_NT),
        "log π_t": (algo.needs_old, have.logp_old_NT),
        "the values of a critic": (algo.critic, have.value_old_NT),
    }
    for name, (needs, column) in needed.items():
        if needs and column is None:
            raise UserError(f"these settings need {name}, which the run did not and its batches do not hold")
    importance_N = have.columns.get("importance") if algo.proportional else None
    plain = labelled(b.step, b.rows, have.carried)
    plain = replace(plain, batch=replace(plain.batch, logp_behaviour_NT=have.logp_behaviour_NT))
    plain = replace(plain, gap_absent=b.gap_absent, used_in=b.used_in)
    return weigh(plain, algo, have.logp_old_NT, have.logp_ref_NT, have.value_old_NT, importance_N)


# --- replay ---


@dataclass(frozen=True)
class Replayed:
    """How one batch's columns and numbers come out once more: the largest difference, and where it is."""

    step: int
    difference: float  # relative to the column's largest value; 0: every bit is the same
    where: str

    @property
    def verdict(self) -> str:
        if self.difference == 0:
            return "identical"
        return "equal up to rounding" if self.difference < 1e-5 else "different"


def replay(b: WeightedBatch, algo: Algorithm) -> Replayed:
    """`b` against itself weighted again by its own algorithm."""
    new = again(b, algo)
    found = {name: _difference(old, new.batch.columns.get(name)) for name, old in b.batch.columns.items()}
    found |= {key: _difference(torch.tensor(v), torch.tensor(new.stats.get(key))) for key, v in b.stats.items()}
    where = max(found, key=lambda name: found[name], default="")
    return Replayed(b.step, found.get(where, 0.0), where)


def _difference(old: Tensor, new: Tensor | None) -> float:
    if new is None or old.shape != new.shape:
        return math.inf
    if torch.equal(old, new):
        return 0.0
    gap = (old.double() - new.double()).abs().max() / old.double().abs().max().clamp(min=1e-12)
    return float(gap) if gap.isfinite() else math.inf


# --- what if ---


def changed(run: Run, overrides: Iterable[str]) -> tuple[Config, Config]:
    """The run's configuration, and the one with algo.* overridden (`alpha=0.5` stands for `algo.alpha=0.5`)."""
    keys = [text if text.startswith("algo.") else f"algo.{text}" for text in overrides]
    return configs.load(run.config_file), configs.load(run.config_file, keys)


@dataclass(frozen=True)
class Effect:
    """One batch under the run's settings and under others."""

    step: int
    stats: dict[str, float]
    other_stats: dict[str, float]
    size_N: Tensor  # each row's weight, or how large its coefficient is where the system has no weights
    other_size_N: Tensor
    push: Tensor  # see `direction`, all tokens in one row
    other_push: Tensor

    @property
    def cosine(self) -> float:
        return cosine([self.push], [self.other_push])

    def record(self) -> dict[str, Any]:
        return {"batch": self.step, "stored": self.stats, "what_if": self.other_stats, "direction": self.cosine}


def record(effects: Sequence[Effect]) -> dict[str, Any]:
    """Of a whole run. `direction`: the cosine over all batches; `weights`: the share of rows from each edge to the next."""
    sizes = {"stored": [e.size_N for e in effects], "what_if": [e.other_size_N for e in effects]}
    return {
        "batches": [e.record() for e in effects],
        "direction": cosine((e.push for e in effects), (e.other_push for e in effects)),
        "weights": {"edges": EDGES} | {name: histogram(each) for name, each in sizes.items()},
    }


def what_if(b: WeightedBatch, algo: Algorithm, other: Algorithm) -> Effect:
    one, two = again(b, algo), again(b, other)
    push, other_push = direction(algo, one), direction(other, two)
    size_N, other_size_N = _size(one, push), _size(two, other_push)
    stats, other_stats = _numbers(one, size_N), _numbers(two, other_size_N)
    return Effect(b.step, stats, other_stats, size_N, other_size_N, push.flatten(), other_push.flatten())


def direction(algo: Algorithm, b: WeightedBatch) -> Tensor:
    """-∂L/∂log π_θ(token) at π_θ = π_t, the point at which a batch's first update begins. (N, T)

    The update's gradient is Σ push · ∇ log π_θ(token). So the cosine of two such tables is that of the two updates in
    the space of tokens' log-probs; it is the cosine of the gradients themselves where those of different tokens are
    orthogonal and equally long, and a stand-in for it elsewhere.
    """
    batch = point(b)
    assert batch.logp_old_NT is not None
    logp_NT = batch.logp_old_NT.clone().requires_grad_(True)
    loss, _ = algo.loss(logp_NT, batch, batch.value_old_NT)
    loss.backward()
    assert logp_NT.grad is not None
    push_NT = -logp_NT.grad / float(algo.denominator(batch))
    if "keep" in batch.columns:
        push_NT = push_NT * batch["keep"][:, None]
    return push_NT.double()


def point(b: WeightedBatch) -> Batch:
    """The batch with log π_t, where it was not scored, as the sampler gave it."""
    if b.batch.logp_old_NT is not None:
        return b.batch
    return replace(b.batch, logp_old_NT=recorded_logp(b))


def _size(b: WeightedBatch, push_NT: Tensor) -> Tensor:
    return b.batch["weight"].double() if "weight" in b.batch.columns else push_NT.abs().sum(-1)


def _numbers(b: WeightedBatch, size_N: Tensor) -> dict[str, float]:
    squared = float((size_N**2).sum()) * len(size_N)
    return {"ess": float(size_N.sum() ** 2) / squared if squared else 0.0} | b.stats


def cosine(one: Iterable[Tensor], two: Iterable[Tensor]) -> float:
    """Of two vectors given in parts, taken together."""
    a, b = torch.cat(list(one)), torch.cat(list(two))
    norm = float(a.norm() * b.norm())
    return float(a @ b) / norm if norm else math.nan


def histogram(sizes: Iterable[Tensor]) -> list[float]:
    """The share of rows from each edge of EDGES up to the next; the last is the share at the batch's largest weight."""
    share_N = torch.cat([size_N / size_N.max() if size_N.max() > 0 else size_N for size_N in sizes])
    bins = torch.bucketize(share_N, torch.tensor(EDGES, dtype=share_N.dtype), right=True) - 1
    return (torch.bincount(bins.clamp(0, len(EDGES) - 1), minlength=len(EDGES)) / len(share_N)).tolist()


def gradient_cosine(model: Path | str, config: Config, b: WeightedBatch, other: Algorithm) -> float:
    """The cosine of the two updates' true gradients, by `model`, which should be the π_t of batch `b`."""
    from dualign.models.packing import plan
    from dualign.models.policy import Policy, load_model

    if config.model.lora is not None:
        raise UserError("--gradients: the gradients of LoRA adapters cannot be had from a checkpoint")
    hf, tokenizer = load_model(config.model.model_copy(update={"name": str(model), "lora": None}))
    policy = Policy(hf, config.model.precision, config.train.prefix_sharing)

    def gradient(algo: Algorithm) -> list[Tensor]:
        policy.zero_grad(set_to_none=True)
        batch = point(again(b, algo))
        rows = [i for i in range(len(batch)) if "keep" not in batch.columns or batch["keep"][i]]
        for part in plan(b.tokens, rows, config.train.micro_batch_tokens, policy.share):
            micro = policy.pack(b.tokens, part, tokenizer.pad_id)
            some = batch.select(micro.rows)
            algo.loss(policy(micro), some, some.value_old_NT)[0].backward()
        return [p.grad.double().flatten() for p in policy.parameters() if p.grad is not None]

    return cosine(gradient(config.algo), gradient(other))
