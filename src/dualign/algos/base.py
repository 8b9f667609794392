"""What every system is: hyper-parameters (a strict pydantic model whose defaults are the paper's) and three pure
functions on tensors. No I/O, no model, no process group: the batch that a system sees is always the global one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from dualign.algos.advantages import Baseline, advantages, group_extreme, tied_rows

Columns = dict[str, Tensor]  # one value (or one row of T values) per completion; first dimension N
Stats = dict[str, float]


@dataclass(frozen=True)
class Batch:
    """The labelled rows of one online batch, or those of them that one update or micro-batch uses.

    Rows without a label are not here: they left the batch, and with it the baseline, μ and σ. Rows of one prompt
    stand together, and no two prompts of a batch have one number. Shapes: N completions, T the longest completion's
    tokens.
    """

    group_N: Tensor  # long; which prompt
    mask_NT: Tensor  # 1 on completion tokens (EOS included), 0 on padding
    reward_N: Tensor  # the label; higher is better
    logp_old_NT: Tensor | None = None  # log π_t per token, untempered, 0 where mask is 0; π_t when the batch is used
    logp_ref_NT: Tensor | None = None  # log π_0, likewise
    value_old_NT: Tensor | None = None  # the critic's value before each token, at sampling time
    missing_eos_N: Tensor | None = None  # bool: cut off at max_new_tokens
    logp_behaviour_NT: Tensor | None = None  # log μ per token, of the policy that sampled the row; None: it was π_t
    absent: int = 0  # completions without a label whose log-probs are known all the same, and
    gap_absent: float = 0.0  # the sum of their log π/π_0, of the policy that sampled them
    columns: Mapping[str, Tensor] = field(default_factory=dict)  # what prepare and refresh computed
    carried: Mapping[str, float] = field(default_factory=dict)  # of the last batch's stats, those that `carried` names

    def __getitem__(self, column: str) -> Tensor:
        return self.columns[column]

    def __len__(self) -> int:
        return int(self.group_N.shape[0])

    def select(self, rows: Tensor) -> Batch:
        """The same batch with only the rows of index tensor `rows`, in that order."""
        picked: dict[str, Any] = {
            f.name: v[rows] for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)
        }
        return replace(self, **picked, columns={k: v[rows] for k, v in self.columns.items()})

    def having(self, columns: Mapping[str, Tensor]) -> Batch:
        return replace(self, columns={**self.columns, **columns})

    def seq(self, logp_NT: Tensor) -> Tensor:
        """log π(y|x), the sum over a completion's tokens. (N, T) -> (N,)"""
        return (logp_NT * self.mask_NT).sum(-1)

    @property
    def seq_old_N(self) -> Tensor:
        """log π_t(y|x)."""
        assert self.logp_old_NT is not None, "log π_t is there only with needs_old"
        return self.seq(self.logp_old_NT)

    @property
    def seq_ref_N(self) -> Tensor:
        """log π_0(y|x)."""
        assert self.logp_ref_NT is not None, "log π_0 is there only with needs_ref"
        return self.seq(self.logp_ref_NT)

    @property
    def seq_behaviour_N(self) -> Tensor:
        """log μ(y|x)."""
        assert self.logp_behaviour_NT is not None
        return self.seq(self.logp_behaviour_NT)


class Algorithm(BaseModel):
    """One system. The trainer asks these declarations, never a name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    name: str
    source: ClassVar[Literal["online", "pairs", "demonstrations"]] = "online"
    """Where rows come from: sampled and labelled, or a fixed set of (chosen, rejected) or of demonstrations.
    Rows of a pair come as one group with rewards 1 (chosen) and 0 (rejected)."""
    critic: ClassVar[bool] = False  # value_old_NT, and values in `refresh` and `loss`
    recompute: ClassVar[bool] = False  # call `refresh` with the current policy before every update
    epochs: int = Field(1, ge=1, description="passes over each online batch")
    tie: float = Field(
        0.0, ge=0, description="completions of a prompt whose rewards differ by at most this are equal to the system"
    )
    updates_per_batch: ClassVar[int | None] = None  # fixed number of updates an epoch; None: by train.update_size

    # In a subclass each of these is a value, or a property where a setting decides.
    needs_ref: ClassVar[bool] = True  # whether logp_ref_NT is needed
    needs_old: ClassVar[bool] = True  # whether logp_old_NT is needed: else π_t is not scored again after sampling
    compares: ClassVar[bool] = False  # learns from how a prompt's completions differ: one alone says nothing
    without_signal: ClassVar[str] = "only its KL to the references moves it"  # a step on a batch without signal
    proportional: ClassVar[str | None] = None  # the column that a row's loss, but for its KL, is a multiple of
    carried: ClassVar[tuple[str, ...]] = ()  # the numbers of `prepare` that the next batch's `prepare` is given
    off_policy: ClassVar[bool] = False
    """Whether a batch may be of an older policy μ (`logp_behaviour_NT`): its optimum does not depend on who sampled.
    Such a batch is given log π_t, whatever `needs_old` says."""
    by_prompt: ClassVar[bool] = False
    """Whether what `prepare` makes of a prompt's rows rests on log π_t of these rows alone, and leaves none out. Then
    log π_t of the rows of a batch's first update can come from that update's own forward pass, a micro-batch at a
    time."""

    def judged(self, batch: Batch) -> Batch:
        """The batch with the rewards as a system that compares takes them: a group within `tie` has all its midpoint."""
        if not (self.tie and self.compares):
            return batch
        top_N = group_extreme(batch.reward_N, batch.group_N, "amax")
        bottom_N = group_extreme(batch.reward_N, batch.group_N, "amin")
        tied_N = tied_rows(batch.reward_N, batch.group_N, self.tie)
        return replace(batch, reward_N=torch.where(tied_N, (top_N + bottom_N) / 2, batch.reward_N))

    def has_signal(self, batch: Batch) -> bool:
        """Whether the rewards tell any completion from those that it is held against."""
        baseline: Baseline = "group" if self.compares else "batch"
        return bool(advantages(batch.reward_N, batch.group_N, baseline).any())

    def check(self, k: int) -> None:
        """Raise ValueError (naming the key, and what to do) where `k` completions per prompt cannot serve."""
        if k == 1 and self.compares:
            other = " or algo.baseline: batch" if "baseline" in type(self).model_fields else ""
            raise ValueError(
                f"rollout.k: {self.name} learns from how a prompt's completions differ, and k = 1 gives it only one "
                f"(an advantage of 0); use k of 2 or more{other}"
            )

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        """Once per online batch, over all its rows, without gradient: advantages, weights, chosen pairs, and
        numbers worth logging. A bool column "keep" leaves rows out of forward and backward."""
        return {}, {}

    def refresh(self, rows: Batch, logp_NT: Tensor, value_NT: Tensor | None) -> Columns:
        """Before each update, over all its rows, without gradient, with the current π_θ (only if `recompute`)."""
        return {}

    def denominator(self, rows: Batch) -> Tensor:
        """What the sum that `loss` returns is divided by, from all rows of one update."""
        return torch.tensor(float(len(rows)))

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        """The *sum* of the loss terms of `rows` (some of an update's rows; whole prompts), and per-row numbers worth
        logging. logp_NT: log π_θ per token with gradient, 0 where mask is 0."""
        raise NotImplementedError
