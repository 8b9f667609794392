"""OAPL: optimal advantage-based policy optimisation with a lagged policy (arXiv 2602.19362)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import group_extreme, group_mean
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class OAPL(Algorithm):
    """log π_θ/π_t of the sequence is regressed on r - V̂, V̂ the optimum's value as the group estimates it. Both
    temperatures are in units of the reward."""

    name: Literal["oapl"] = "oapl"
    beta1: float = Field(1.0, gt=0, description="temperature of V̂ = β₁ log mean exp(r/β₁) over a prompt's completions")
    beta2: float = Field(1e-3, gt=0, description="of log π_θ/π_t, the sequence's")

    compares: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = True
    needs_ref: ClassVar[bool] = False
    without_signal: ClassVar[str] = "only its pull to π_t moves it"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        # r - V̂, from the group's best reward down: exp does not overflow
        top_N = group_extreme(batch.reward_N, batch.group_N, "amax")
        below_N = batch.reward_N - top_N
        A_N = below_N - self.beta1 * group_mean((below_N / self.beta1).exp(), batch.group_N).log()
        return {"advantage": A_N}, {"advantage_std": float(A_N.std(unbiased=False))}

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # (β₂ρ - (r - V̂))²
        rho_N = rows.seq(logp_NT) - rows.seq_old_N
        return ((self.beta2 * rho_N - rows["advantage"]) ** 2).sum(), {"kl_old": -rho_N.detach()}
