"""Policy mirror descent, as Kimi k1.5 does it (arXiv 2501.12599, Sec. 2.3.2)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import advantages
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class PMD(Algorithm):
    """Policy gradient with the group's mean as baseline, held to π_t by the square of ρ = log π_θ/π_t of the
    sequence. τ is in units of the reward."""

    name: Literal["pmd"] = "pmd"
    tau: float = Field(0.05, ge=0, description="of ½ (log π_θ/π_t)², the sequence's")

    compares: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = True
    needs_ref: ClassVar[bool] = False
    without_signal: ClassVar[str] = "only its pull to π_t moves it"

    @property
    def needs_old(self) -> bool:
        return self.tau > 0

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        A_N = advantages(batch.reward_N, batch.group_N, "group")
        return {"advantage": A_N}, {"advantage_std": float(A_N.std(unbiased=False))}

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # -[(r - group mean) log π_θ - ½ τ ρ²]
        logp_N = rows.seq(logp_NT)
        total = -(rows["advantage"] * logp_N).sum()
        if not self.needs_old:
            return total, {}
        rho_N = logp_N - rows.seq_old_N
        return total + 0.5 * self.tau * (rho_N**2).sum(), {"kl_old": -rho_N.detach()}
