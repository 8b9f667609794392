"""RLOO: REINFORCE with a leave-one-out baseline (Kool et al. 2019; Ahmadian et al. 2024), as in ICLR 2026 App. B.3."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import group_size, group_sum
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class RLOO(Algorithm):
    """The KL to π_0 is in the reward, at sampling time. HelpSteer2: β = 0.05."""

    name: Literal["rloo"] = "rloo"
    beta: float = Field(0.03, ge=0, description="of the KL to π_0")

    compares: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = True
    proportional: ClassVar[str] = "advantage"

    @property
    def needs_ref(self) -> bool:
        return self.beta > 0

    @property
    def needs_old(self) -> bool:
        return self.beta > 0

    @property
    def without_signal(self) -> str:
        return "only its KL to π_0 moves it" if self.beta else "its gradient is 0"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        # R = r - β (log π_t - log π_0),  A = R - mean of the others of the group
        kl_N = batch.seq_old_N - batch.seq_ref_N if self.beta > 0 else torch.zeros_like(batch.reward_N)
        R_N = batch.reward_N - self.beta * kl_N
        others_N = group_size(batch.group_N, R_N.dtype) - 1
        A_N = R_N - (group_sum(R_N, batch.group_N) - R_N) / others_N.clamp(min=1)
        A_N = torch.where(others_N > 0, A_N, 0.0)  # alone in its group, a row has no baseline, so nothing to learn from
        return {"advantage": A_N}, {"advantage_std": float(A_N.std(unbiased=False)), "kl_ref": float(kl_N.mean())}

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        return -(rows["advantage"] * rows.seq(logp_NT)).sum(), {}
