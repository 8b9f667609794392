"""Dual-KL DPO: DPO on the optimum of the dual-KL objective (ICLR 2026, Thm 4.2; asked for in v1's conclusion).

That optimum, π* ∝ π_0^α π_t^(1-α) exp(r/β), gives r = β (log π* - α log π_0 - (1-α) log π_t) + const, and so DPO's loss
with the mixture of both references where DPO has π_0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.base import Batch
from dualign.algos.dpo import DPO


class DualDPO(DPO):
    """No paper gives values: α is DAR's, β DPO's. α = 1 is DPO."""

    name: Literal["dual_dpo"] = "dual_dpo"  # type: ignore[assignment]
    alpha: float = Field(0.1, ge=0, le=1, description="of the two references, π_0 and π_t, how much π_0")
    beta: float = Field(0.1, gt=0, description="of the log-ratios to both references in the logistic")

    @property
    def needs_ref(self) -> bool:
        return self.alpha > 0

    @property
    def needs_old(self) -> bool:
        return self.alpha < 1

    def score(self, logp_NT: Tensor, rows: Batch) -> Tensor:
        """(N, T) -> (N,): log π_θ - α log π_0 - (1-α) log π_t, sums over the sequence."""
        score_N = rows.seq(logp_NT)
        if self.needs_ref:
            score_N = score_N - self.alpha * rows.seq_ref_N
        return score_N - (1 - self.alpha) * rows.seq_old_N if self.needs_old else score_N


class OfflineDualDPO(DualDPO):
    """On a fixed preference set. π_t is a snapshot of π_θ whose log-probs are taken before a batch's first update: it is
    renewed every train.online_batch / train.update_size updates, times epochs, and is no second model in memory."""

    name: Literal["offline_dual_dpo"] = "offline_dual_dpo"  # type: ignore[assignment]
    source: ClassVar[Literal["online", "pairs", "demonstrations"]] = "pairs"
    off_policy: ClassVar[bool] = False
    alpha: float = Field(
        0.1,
        ge=0,
        le=1,
        description="of the two references, how much π_0; the other, π_t, is the policy before the batch's first "
        "update: a snapshot renewed every train.online_batch / train.update_size updates, times epochs",
    )
