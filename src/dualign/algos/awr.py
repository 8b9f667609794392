"""The weighted regressions that DAR comes from: RWR (Peters & Schaal 2007) and AWR (Peng et al. 2019).

Neither looks at π_0 or π_t: DAR with α = 0, without the normalisation of its advantages.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import Baseline, advantages
from dualign.algos.base import Algorithm, Batch, Columns, Stats
from dualign.algos.dar import weight_stats
from dualign.common.errors import UserError


class RWR(Algorithm):
    """w = exp(r / β), unbounded. β is in units of the reward; neither paper on DAR gives one."""

    name: Literal["rwr"] = "rwr"
    beta: float = Field(1.0, gt=0, description="temperature of the exponential")

    without_signal: ClassVar[str] = "all weights are equal: SFT on its own samples"
    needs_ref: ClassVar[bool] = False
    needs_old: ClassVar[bool] = False

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        weight_N = (batch.reward_N / self.beta).exp()
        if weight_N.isinf().any():
            raise UserError(
                f"algo.beta: exp(r/β) overflows for the reward {float(batch.reward_N.max()):g} at β = {self.beta:g}; "
                "use a larger beta, or awr, whose weights are clipped"
            )
        never_N = torch.zeros_like(weight_N, dtype=torch.bool)
        return {"weight": weight_N}, weight_stats(batch, weight_N, never_N, batch.reward_N.std(unbiased=False))

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        return -(rows["weight"] * rows.seq(logp_NT)).sum(), {}


class AWR(RWR):
    """w = min(exp(A / β), w_clip), A = r - baseline, in units of the reward. The clip is Peng et al.'s."""

    name: Literal["awr"] = "awr"  # type: ignore[assignment]
    w_clip: float = Field(20.0, gt=0, description="a weight is at most this")
    baseline: Baseline = Field(
        "group", description="what is subtracted from a reward: its prompt's mean, the batch's, nothing"
    )

    @property
    def compares(self) -> bool:
        return self.baseline == "group"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        A_N = advantages(batch.reward_N, batch.group_N, self.baseline)
        log_w_N = A_N / self.beta
        clipped_N = log_w_N > math.log(self.w_clip)
        weight_N = log_w_N.clamp(max=math.log(self.w_clip)).exp()
        stats = weight_stats(batch, weight_N, clipped_N, A_N.std(unbiased=False))
        return {"advantage": A_N, "weight": weight_N, "clipped": clipped_N}, stats
