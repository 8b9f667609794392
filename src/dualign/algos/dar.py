"""DAR: Dual-regularized Advantage Regression (ICLR 2026, Eq. 3-4, Alg. 1, Thm 4.2; arXiv 2504.14177v1, Eq. 5, 7, 14).

Online RLHF as weighted supervised fine-tuning: each sampled completion's log-likelihood, weighted by how much the
optimum of the dual-KL objective prefers it to the policy that sampled it. That optimum does not depend on who sampled,
so a completion of an older policy μ is weighted against μ.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import Baseline, advantages, group_extreme, group_size, normalise
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class DAR(Algorithm):
    """α mixes the two references (0: only π_t, 1: only π_0); β is the temperature. ICLR's naming and defaults
    (direct AI alignment; for RLHF with a reward model ICLR uses α = β = 0.5)."""

    name: Literal["dar"] = "dar"
    alpha: float = Field(0.1, ge=0, le=1, description="of the two references, π_0 and π_t, how much π_0")
    beta: float = Field(0.05, gt=0, description="temperature of exp(A/β)")
    w_clip: float = Field(20.0, gt=0, description="a weight, the product of both factors, is at most this")
    baseline: Baseline = Field(
        "group", description="what is subtracted from a reward: its prompt's mean, the batch's, nothing"
    )
    skip_below: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="leave out of forward and backward the rows that weigh less than this share of the batch's "
        "largest weight; 0 trains on every row",
    )

    proportional: ClassVar[str] = "weight"
    off_policy: ClassVar[bool] = True

    @classmethod
    def from_v1(cls, alpha: float, beta: float, **more: object) -> Self:
        """From the arXiv v1 pair (α₁, β₁): α = α₁/(α₁+β₁), β = α₁+β₁."""
        return cls(alpha=alpha / (alpha + beta), beta=alpha + beta, **more)  # type: ignore[arg-type]

    @property
    def compares(self) -> bool:
        return self.baseline == "group"

    @property
    def without_signal(self) -> str:
        if self.alpha == 0:
            return "every weight is 1: SFT on its own samples"
        return f"w = (π_0/π_t)^{self.alpha:g}: SFT on its own samples, pulled to π_0"

    @property
    def needs_ref(self) -> bool:
        return self.alpha > 0

    @property
    def needs_old(self) -> bool:
        return self.alpha > 0

    @property
    def by_prompt(self) -> bool:
        return not self.skip_below  # else by the batch's largest weight

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        # A_i = r_i - baseline;  A_norm = (A - μ_A) / σ_A                                        (Alg. 1)
        # each row within the online batch in which it was sampled
        A_N = advantages(batch.reward_N, batch.group_N, self.baseline, batch.batch_N)
        A_norm_N, sigma = normalise(A_N, batch.batch_N)
        # w_reg = (π_0/π_t)^α,  w_adv = exp(A_norm/β),  w = min(w_reg · w_adv, w_clip)           (Thm 4.2, Alg. 1)
        # in log space: β = 0.05 and A_norm = 5 overflow exp in fp32
        log_reg_N = self.alpha * (batch.seq_ref_N - batch.seq_old_N) if self.alpha > 0 else torch.zeros_like(A_N)
        log_adv_N = A_norm_N / self.beta
        log_w_N = log_reg_N + log_adv_N
        # y ~ μ: the target π* is the same, the proposal is not: w = π_0^α π_t^(1-α) exp(A_norm/β) / μ
        stale: Columns = {}
        if batch.logp_behaviour_NT is not None:
            stale = {"log_w_stale": batch.seq_old_N - batch.seq_behaviour_N}
            log_w_N = log_w_N + stale["log_w_stale"]
        clipped_N = log_w_N > math.log(self.w_clip)
        weight_N = log_w_N.clamp(max=math.log(self.w_clip)).exp()
        keep_N = weight_N >= self.skip_below * weight_N.max() if self.skip_below else torch.ones_like(clipped_N)
        dropped = share(weight_N[~keep_N].sum(), weight_N.sum())
        stats = weight_stats(batch, weight_N, clipped_N, sigma) | {"dropped_weight": dropped}
        return {
            "advantage": A_norm_N,
            "log_w_reg": log_reg_N,
            "log_w_adv": log_adv_N,
            **stale,
            "weight": weight_N,
            "clipped": clipped_N,
            "keep": keep_N,
        }, stats

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # L(θ) = -(1/N) Σ w_i log π_θ(y_i|x)                                                     (Eq. 4)
        return -(rows["weight"] * rows.seq(logp_NT)).sum(), {}


def weight_stats(batch: Batch, weight_N: Tensor, clipped_N: Tensor, sigma: Tensor) -> Stats:
    """How the weights are spread: share clipped, effective sample size (Σw)²/Σw² as a share of N, share of rows in tied
    groups (under DAR they train with w = (π_0/π_t)^α), σ_A."""
    w = weight_N.double()
    gap_N = group_extreme(batch.reward_N, batch.group_N, "amax") - group_extreme(batch.reward_N, batch.group_N, "amin")
    tied_N = (gap_N == 0) & (group_size(batch.group_N, gap_N.dtype) > 1)  # beside a row that is alone, nothing stands
    return {
        "sigma_advantage": float(sigma),
        "clip_rate": float(clipped_N.float().mean()),
        "ess": share(w.sum() ** 2, (w**2).sum() * len(w)),
        "tied": float(tied_N.float().mean()),
        "weight_mean": float(w.mean()),
    }


def share(part: Tensor, whole: Tensor) -> float:
    """part / whole, 0 where there is nothing (weights so small that all of them underflow)."""
    return float(part / whole) if whole > 0 else 0.0
