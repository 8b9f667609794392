"""Iterative SFT on the best of K (ICLR 2026, App. B.3: best-of-4, one update per online batch)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from dualign.algos.advantages import advantages, best_and_worst
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class IterSFT(Algorithm):
    name: Literal["iter_sft"] = "iter_sft"
    updates_per_batch: ClassVar[int | None] = 1

    needs_ref: ClassVar[bool] = False
    needs_old: ClassVar[bool] = False
    without_signal: ClassVar[str] = "the first of equals is taken for the best: SFT on its own samples"

    def has_signal(self, batch: Batch) -> bool:
        return bool(advantages(batch.reward_N, batch.group_N, "group").any())

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        best_N, _ = best_and_worst(batch.reward_N, batch.group_N)
        return {"keep": best_N}, {"reward_best": float(batch.reward_N[best_N].mean())}

    def denominator(self, rows: Batch) -> Tensor:
        return rows.mask_NT[rows["keep"]].sum().clamp(min=1)

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        return -(rows.seq(logp_NT) * rows["keep"]).sum(), {}
