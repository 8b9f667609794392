"""CISPO: REINFORCE whose importance weights are clipped, not its gradients (MiniMax-M1, arXiv 2506.13585, Eq. 4-5; with
this upper clip in arXiv 2510.13786)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.base import Algorithm, Batch, Columns, Stats
from dualign.algos.grpo import relative


class CISPO(Algorithm):
    """GRPO's advantages; no KL."""

    name: Literal["cispo"] = "cispo"
    ratio_max: float = Field(5.0, gt=0, description="the ratio π_θ/π_t of a token counts for at most this")

    compares: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = True
    needs_ref: ClassVar[bool] = False
    proportional: ClassVar[str] = "advantage"
    without_signal: ClassVar[str] = "its gradient is 0"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        return relative(batch)

    def denominator(self, rows: Batch) -> Tensor:
        return rows.mask_NT.sum().clamp(min=1)

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # -Σ_k sg[min(ρ_k, ratio_max)] A log π_θ,k / tokens
        assert rows.logp_old_NT is not None
        mask_NT = rows.mask_NT.to(logp_NT.dtype)
        ratio_NT = (logp_NT.detach() - rows.logp_old_NT).exp()
        clipped_N = ((ratio_NT > self.ratio_max) * mask_NT).sum(-1) / mask_NT.sum(-1).clamp(min=1)
        term_NT = -ratio_NT.clamp(max=self.ratio_max) * rows["advantage"][:, None] * logp_NT
        return (term_NT * mask_NT).sum(), {"ratio_clipped": clipped_N}
