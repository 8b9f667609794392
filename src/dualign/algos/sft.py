"""SFT on demonstrations: makes π_0 (ICLR 2026, App. B.1)."""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from dualign.algos.base import Algorithm, Batch, Columns


class SFT(Algorithm):
    """Mean negative log-likelihood of a demonstration's tokens (the prompt's are not trained on)."""

    name: Literal["sft"] = "sft"
    source: ClassVar[Literal["online", "pairs", "demonstrations"]] = "demonstrations"

    needs_ref: ClassVar[bool] = False
    needs_old: ClassVar[bool] = False

    def denominator(self, rows: Batch) -> Tensor:
        return rows.mask_NT.sum().clamp(min=1)

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        return -rows.seq(logp_NT).sum(), {}
