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

from dualign.algos.adaptive import BETA_RANGE, next_alpha, trust_region, weights_kl
from dualign.algos.advantages import Baseline, advantages, normalise, tied_rows
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

    epsilon: float | None = Field(
        None,
        gt=0,
        description="nats; β is found for each online batch so that its exp(A/β) are this far (KL) from uniform; null: "
        "beta as it is",
    )
    kl_budget: float | None = Field(
        None,
        gt=0,
        description="nats of a completion; α rises while the KL of π_t to π_0 is above this and falls while it is below, "
        "beginning with alpha; null: alpha as it is",
    )
    alpha_rate: float = Field(
        0.1, gt=0, le=1, description="with kl_budget: how far α's level moves in a batch, in logs"
    )
    alpha_lowest: float = Field(0.01, gt=0, le=1, description="with kl_budget: α is at least this, and at most 1")

    carried: ClassVar[tuple[str, ...]] = ("alpha_level", "kl_sampled")
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
        if self.kl_budget is not None:
            return "w = (π_0/π_t)^α: SFT on its own samples, pulled to π_0"
        if self.alpha == 0:
            return "every weight is 1: SFT on its own samples"
        return f"w = (π_0/π_t)^{self.alpha:g}: SFT on its own samples, pulled to π_0"

    @property
    def needs_ref(self) -> bool:
        return self.alpha > 0 or self.kl_budget is not None

    @property
    def needs_old(self) -> bool:
        return self.needs_ref

    @property
    def by_prompt(self) -> bool:
        return not self.skip_below  # else by the batch's largest weight

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        # A_i = r_i - baseline;  A_norm = (A - μ_A) / σ_A                                        (Alg. 1)
        A_N = advantages(batch.reward_N, batch.group_N, self.baseline)
        A_norm_N, sigma = normalise(A_N)
        alpha, about_alpha = self.find_alpha(batch)
        beta, about_beta = self.find_beta(A_norm_N)
        # w_reg = (π_0/π_t)^α,  w_adv = exp(A_norm/β),  w = min(w_reg · w_adv, w_clip)           (Thm 4.2, Alg. 1)
        # in log space: β = 0.05 and A_norm = 5 overflow exp in fp32
        log_reg_N = alpha * (batch.seq_ref_N - batch.seq_old_N) if self.needs_ref else torch.zeros_like(A_N)
        log_adv_N = A_norm_N / beta
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
        stats = weight_stats(batch, weight_N, clipped_N, sigma) | {"dropped_weight": dropped} | about_alpha | about_beta
        return {
            "advantage": A_norm_N,
            "log_w_reg": log_reg_N,
            "log_w_adv": log_adv_N,
            **stale,
            "weight": weight_N,
            "clipped": clipped_N,
            "keep": keep_N,
        }, stats

    def find_alpha(self, batch: Batch) -> tuple[float, Stats]:
        """α for this batch, from what the last one left behind; and what this one leaves: α's level and the KL of the
        policy that sampled it to π_0, nats a completion."""
        if self.kl_budget is None:
            return self.alpha, {}
        level = alpha = batch.carried.get("alpha_level", max(self.alpha, self.alpha_lowest))
        if "kl_sampled" in batch.carried:
            kl = batch.carried["kl_sampled"]
            level, alpha = next_alpha(level, kl, self.kl_budget, self.alpha_rate, self.alpha_lowest)
        # y ~ μ: an estimate of KL(μ‖π_0), and of π_t where fresh; over all y, as a KL needs no label
        sampled_N = batch.seq_old_N if batch.logp_behaviour_NT is None else batch.seq_behaviour_N
        kl = (float((sampled_N - batch.seq_ref_N).sum()) + batch.gap_absent) / (len(batch) + batch.absent)
        return alpha, {"alpha_found": alpha, "alpha_level": level, "kl_sampled": kl}

    def find_beta(self, A_norm_N: Tensor) -> tuple[float, Stats]:
        """β for this batch: `beta` where all advantages are equal, and so all weights, whatever β is."""
        if self.epsilon is None:
            return self.beta, {}
        found = trust_region(A_norm_N, self.epsilon)
        beta = self.beta if found is None else found
        bounded = float(found in (None, *BETA_RANGE))  # no β reaches epsilon
        return beta, {"beta_found": beta, "weights_kl": weights_kl(A_norm_N, beta), "beta_bounded": bounded}

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # L(θ) = -(1/N) Σ w_i log π_θ(y_i|x)                                                     (Eq. 4)
        return -(rows["weight"] * rows.seq(logp_NT)).sum(), {}


def weight_stats(batch: Batch, weight_N: Tensor, clipped_N: Tensor, sigma: Tensor) -> Stats:
    """How the weights are spread: share clipped, effective sample size (Σw)²/Σw² as a share of N, share of rows in tied
    groups (under DAR they train with w = (π_0/π_t)^α), σ_A."""
    w = weight_N.double()
    tied_N = tied_rows(batch.reward_N, batch.group_N)  # beside a row that is alone, nothing stands
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
