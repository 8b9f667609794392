"""GVPO: group variance policy optimisation (Zhang et al. 2025, arXiv 2504.19599, Eq. 9)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import advantages, group_mean, group_size
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class GVPO(Algorithm):
    """The implicit rewards βρ, ρ = log π_θ/π_t of the sequence, are regressed on the rewards, both less their group's
    mean. The one minimiser is π_t exp(r/β)/Z, whoever sampled the group. β is in units of the reward."""

    name: Literal["gvpo"] = "gvpo"
    beta: float = Field(0.1, gt=0, description="of the KL to π_t, in units of the reward")

    compares: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = True
    off_policy: ClassVar[bool] = True
    needs_ref: ClassVar[bool] = False
    without_signal: ClassVar[str] = "only its pull to π_t moves it"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        A_N = advantages(batch.reward_N, batch.group_N, "group")
        return {"advantage": A_N}, {"advantage_std": float(A_N.std(unbiased=False))}

    def denominator(self, rows: Batch) -> Tensor:
        return torch.tensor(float(len(rows.group_N.unique())))  # prompts

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # ½ Σ_i [(βρ_i - group mean) - (r_i - group mean)]² / (K-1)
        rho_N = rows.seq(logp_NT) - rows.seq_old_N
        implicit_N = self.beta * (rho_N - group_mean(rho_N, rows.group_N))
        free_N = (group_size(rows.group_N, rho_N.dtype) - 1).clamp(min=1)
        return (0.5 * (implicit_N - rows["advantage"]) ** 2 / free_N).sum(), {"kl_old": -rho_N.detach()}
