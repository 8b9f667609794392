"""DAO: Dual-regularized Advantage Optimization, DAR's objective by policy gradient (ICLR 2026, App. A.4)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import Baseline, advantages, normalise
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class DAO(Algorithm):
    """As DAR, without the weights' clip. The paper's experiments use the REINFORCE style."""

    name: Literal["dao"] = "dao"
    variant: Literal["reinforce", "ppo"] = Field(
        "reinforce", description="policy gradient, or with the sequence's ratio"
    )
    alpha: float = Field(0.1, ge=0, le=1, description="of the two references, π_0 and π_t, how much π_0")
    beta: float = Field(0.05, gt=0, description="of the two KL terms together")
    baseline: Baseline = Field(
        "group", description="what is subtracted from a reward: its prompt's mean, the batch's, nothing"
    )

    without_signal: ClassVar[str] = "only its KL to π_0 and π_t moves it"
    by_prompt: ClassVar[bool] = True

    @property
    def compares(self) -> bool:
        return self.baseline == "group"

    @property
    def needs_ref(self) -> bool:
        return self.alpha > 0

    @property
    def needs_old(self) -> bool:
        return self.alpha < 1 or self.variant == "ppo"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        A_norm_N, sigma = normalise(advantages(batch.reward_N, batch.group_N, self.baseline))
        # α log π_0 + (1-α) log π_t: the one reference that stands for both                     (Prop. 4.1)
        mixture_N = torch.zeros_like(A_norm_N)
        if self.alpha > 0:
            mixture_N = mixture_N + self.alpha * batch.seq_ref_N
        if self.alpha < 1:
            mixture_N = mixture_N + (1 - self.alpha) * batch.seq_old_N
        return {"advantage": A_norm_N, "log_mixture": mixture_N}, {"sigma_advantage": float(sigma)}

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        logp_N = rows.seq(logp_NT)
        kl_N = logp_N - rows["log_mixture"]  # its mean over y ~ π_θ is KL(π_θ ‖ π_0^α π_t^(1-α)), up to log C(x)
        if self.variant == "reinforce":
            return -((rows["advantage"] - self.beta * kl_N).detach() * logp_N).sum(), {"kl_mixture": kl_N.detach()}
        ratio_N = (logp_N - rows.seq_old_N).exp()  # of the whole sequence
        return -(ratio_N * (rows["advantage"] - self.beta * kl_N)).sum(), {
            "kl_mixture": kl_N.detach(),
            "ratio": ratio_N.detach(),
        }
