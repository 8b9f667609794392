"""One online batch as data: rollouts and labels of every row, and the tensors of the rows that have a label."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualign.algos import Algorithm, Batch, Stats
from dualign.algos.advantages import group_size, tied_rows
from dualign.common.errors import StopRun
from dualign.common.intervals import half_width
from dualign.common.types import Label, Rollout
from dualign.models.packing import Tokens

PENALTY = "missing_eos"  # what a label's parts call rollout.missing_eos_penalty


@dataclass(frozen=True)
class Row:
    rollout: Rollout
    label: Label


@dataclass(frozen=True, repr=False)
class WeightedBatch:
    """`rows`: everything sampled, in index order. `tokens` and `batch`: only the rows with a label, likewise ordered;
    a row without one has left the batch, the baseline, μ and σ."""

    step: int
    rows: tuple[Row, ...]
    tokens: Tokens
    batch: Batch
    stats: Stats = field(default_factory=dict)
    gap_absent: float | None = None  # sum of log π_t/π_0 over the rows without a label, where it was scored
    used_in: int | None = None  # the online batch during which it was trained on again

    def __repr__(self) -> str:
        prompts = len({row.rollout.group for row in self.rows})
        mean = f", mean reward {float(self.batch.reward_N.mean()):.3g}" if len(self.batch) else ""
        return (
            f"WeightedBatch({self.step}: {len(self.rows)} completions of {prompts} prompts, {self.absent} absent{mean})"
        )

    @property
    def absent(self) -> int:
        return len(self.rows) - len(self.tokens)

    def handed_on(self, algo: Algorithm) -> Stats:
        """What the next batch's weights rest on."""
        return {name: self.stats[name] for name in algo.carried if name in self.stats}

    @property
    def sampled_NT(self) -> Tensor | None:
        """Log-probs of the policy that sampled it: μ where that is not π_t. None where they were not scored."""
        behaviour_NT = self.batch.logp_behaviour_NT
        return self.batch.logp_old_NT if behaviour_NT is None else behaviour_NT

    @property
    def gap_N(self) -> Tensor | None:
        """log π/π_0 of every row with a label, π being the policy that sampled it. None where either was not scored."""
        if (sampled_NT := self.sampled_NT) is None or self.batch.logp_ref_NT is None:
            return None
        return self.batch.seq(sampled_NT) - self.batch.seq_ref_N

    @property
    def gap(self) -> float | None:
        """Mean of log π/π_0 over the completions, nats: also of those without a label, where they were scored. π is the
        policy that sampled them. None where π or π_0 was not scored."""
        if (gap_N := self.gap_N) is None:
            return None
        if self.gap_absent is None:
            return float(gap_N.mean()) if len(gap_N) else None
        return (float(gap_N.double().sum()) + self.gap_absent) / len(self.rows)

    @property
    def gap_ci(self) -> float | None:
        """Half the 95 % interval of `gap`, over the prompts that have a label. None: there is none."""
        if (gap_N := self.gap_N) is None:
            return None
        gap_N, group_N = gap_N.double(), self.batch.group_N
        half = half_width([float(gap_N[group_N == group].mean()) for group in group_N.unique()])
        return None if math.isnan(half) else half


def labelled(step: int, rows: Sequence[Row], carried: Mapping[str, float] | None = None) -> WeightedBatch:
    """The batch before its log-probs and weights are known. `carried`: what the last batch left for it."""
    ordered = tuple(sorted(rows, key=lambda row: row.rollout.index))
    present = [row for row in ordered if row.label.value is not None]
    tokens = tokens_of(present)
    mask = torch.zeros(len(present), tokens.width)
    for i, ids in enumerate(tokens.completion_ids):
        mask[i, : len(ids)] = 1
    batch = Batch(
        group_N=torch.tensor(tokens.group, dtype=torch.long),
        mask_NT=mask,
        reward_N=torch.tensor([row.label.value for row in present], dtype=torch.float64),
        missing_eos_N=torch.tensor([row.rollout.finish == "length" for row in present], dtype=torch.bool),
        carried=dict(carried or {}),
    )
    return WeightedBatch(step, ordered, tokens, batch)


def tokens_of(rows: Sequence[Row]) -> Tokens:
    return Tokens(
        tuple(r.rollout.prompt_ids for r in rows),
        tuple(r.rollout.completion_ids for r in rows),
        tuple(r.rollout.group for r in rows),
    )


def sampled_by(b: WeightedBatch, logp: Mapping[int, Sequence[float]]) -> WeightedBatch:
    """The batch with log μ, of the policy that sampled it, per token by row index."""
    behaviour_NT = torch.zeros(len(b.tokens), b.tokens.width)
    for i, row in enumerate(row for row in b.rows if row.label.value is not None):
        behaviour_NT[i, : len(logp[row.rollout.index])] = torch.tensor(logp[row.rollout.index])
    return replace(b, batch=replace(b.batch, logp_behaviour_NT=behaviour_NT))


def recorded_logp(b: WeightedBatch) -> Tensor:
    """(N, T) fp32: log π_t of the rows with a label, as the sampler recorded it; 0 where it recorded none."""
    logp_NT = np.zeros((len(b.tokens), b.tokens.width), np.float32)
    for i, row in enumerate(row for row in b.rows if row.label.value is not None):
        logp_NT[i, : len(row.rollout.sampler_logp)] = row.rollout.sampler_logp
    return torch.from_numpy(logp_NT)


def importance(b: WeightedBatch, logp_NT: Tensor | None, cap: float | None) -> Tensor | None:
    """(N,) how much likelier each completion is under the policy that sampled it, as that scores it, than its sampler
    made it, at most `cap`: truncated importance sampling (Ionides 2008). None without a `cap`."""
    if cap is None or logp_NT is None:
        return None
    log_ratio_N = b.batch.seq(logp_NT.double() - recorded_logp(b).double())
    return log_ratio_N.clamp(max=math.log(cap)).exp().float()


def weigh(
    b: WeightedBatch,
    algo: Algorithm,
    logp_old_NT: Tensor | None,
    logp_ref_NT: Tensor | None,
    value_NT: Tensor | None,
    importance_N: Tensor | None = None,
) -> WeightedBatch:
    """Adds what is constant while the batch is used: log π_t, log π_0, values, and what the algorithm makes of them,
    computed once in double precision and kept in single; times `importance_N`, where there is one."""
    whole = replace(b.batch, logp_old_NT=logp_old_NT, logp_ref_NT=logp_ref_NT, value_old_NT=value_NT)
    if b.gap_absent is not None:
        whole = replace(whole, absent=b.absent, gap_absent=b.gap_absent)
    precise = replace(
        whole,
        mask_NT=whole.mask_NT.double(),
        **{
            name: value.double()
            for name in ("logp_old_NT", "logp_ref_NT", "value_old_NT", "logp_behaviour_NT")
            if (value := getattr(whole, name)) is not None
        },
    )
    columns, stats = algo.prepare(algo.judged(precise)) if len(b.tokens) else ({}, dict(b.batch.carried))
    if algo.source == "online" and (tied := tied_prompts(b.batch, algo.tie)) is not None:
        stats = {**stats, "tied_prompts": tied}
    if not has_signal(b, algo):
        stats = {**stats, "without_signal": 1.0}
    if importance_N is not None and columns:
        scaled = str(algo.proportional)
        columns = {**columns, scaled: columns[scaled] * importance_N.double(), "importance": importance_N}
        stats = {**stats, "importance": float(importance_N.mean())}
    single = {k: v.float() if v.is_floating_point() else v for k, v in columns.items()}
    return replace(b, batch=replace(whole, reward_N=whole.reward_N.float(), columns=single), stats=stats)


def tied_prompts(batch: Batch, tie: float) -> float | None:
    """The share of prompts whose completions all have one reward, up to `tie`, among those with two labels or more. None:
    there are none."""
    several_N = group_size(batch.group_N, torch.float64) > 1
    tied_N = tied_rows(batch.reward_N, batch.group_N, tie)
    groups, tied = (len(batch.group_N[rows].unique()) for rows in (several_N, tied_N))
    return tied / groups if groups else None


def has_signal(b: WeightedBatch, algo: Algorithm) -> bool:
    """Whether the rewards of the batch tell the system anything. A fixed set always does; so does, for want of a step, a
    batch without rows."""
    return algo.source != "online" or not len(b.tokens) or algo.has_signal(algo.judged(b.batch))


def check_finite(b: WeightedBatch, why: Callable[[str, Tokens], str] = lambda name, tokens: "") -> None:
    """Raises StopRun, naming the row, where a log-prob, value, advantage or weight is NaN or infinite. `why` says of a
    log-prob or value of a row where it comes from."""
    scores = {"log π_t": b.batch.logp_old_NT, "log π_0": b.batch.logp_ref_NT, "value": b.batch.value_old_NT}
    scores |= {"log μ": b.batch.logp_behaviour_NT}
    present = [row.rollout.index for row in b.rows if row.label.value is not None]
    for name, value in {**scores, **b.batch.columns}.items():
        if value is not None and value.is_floating_point() and not value.isfinite().all():
            bad = (~value.isfinite()).view(len(value), -1).any(1).nonzero()[:, 0].tolist()
            raise StopRun(
                f"online batch {b.step}: {name} of completion {present[bad[0]]} is NaN or infinite ({len(bad)} of "
                f"{len(value)} rows); nothing was trained on it, and its completions and labels are kept. "
                + (why(name, b.tokens.select(bad[:1])) if name in scores else "")
            )


def updates(b: WeightedBatch, algo: Algorithm, update_size: int, seed: int) -> Iterator[tuple[Tokens, Batch]]:
    """The rows of each optimizer step."""
    for rows in update_rows(b, algo, update_size, seed):
        yield part_of(b, rows)


def update_rows(b: WeightedBatch, algo: Algorithm, update_size: int, seed: int) -> Iterator[list[int]]:
    """The numbers of the rows of each optimizer step: whole prompts, shuffled anew in every epoch by the run's seed and
    the batch's number alone. The prompts are split as evenly as the number of updates allows."""
    groups = sorted(set(b.tokens.group))
    members: dict[int, list[int]] = {g: [] for g in groups}
    for row, g in enumerate(b.tokens.group):
        members[g].append(row)
    place = [seed, b.step] if b.used_in is None else [seed, b.step, b.used_in]
    count = algo.updates_per_batch or max(1, round(len(b.rows) / update_size))
    for epoch in range(algo.epochs):
        order = np.random.default_rng([*place, epoch]).permutation(len(groups))
        for part in np.array_split(order, min(count, len(groups)) or 1):
            rows = [row for i in sorted(part.tolist()) for row in members[groups[i]]]
            if rows:
                yield rows


def part_of(b: WeightedBatch, rows: list[int]) -> tuple[Tokens, Batch]:
    """These rows alone, as wide as the longest of them."""
    tokens = b.tokens.select(rows)
    return tokens, trim(b.batch.select(torch.tensor(rows)), tokens.width)


def trim(batch: Batch, width: int) -> Batch:
    """The first `width` tokens of every row: without the padding that only longer completions needed, elsewhere in the
    online batch."""

    def cut(value: Tensor) -> Tensor:
        return value[:, :width] if value.dim() > 1 else value

    tensors: dict[str, Any] = {
        f.name: cut(value) for f in fields(batch) if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return replace(batch, **tensors, columns={name: cut(value) for name, value in batch.columns.items()})
