"""SimPO (Meng et al. 2024, Eq. 6): no reference policy, length-averaged log-probs, a target margin."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.base import Batch
from dualign.algos.pairs import Pairs, logistic


class SimPO(Pairs):
    name: Literal["simpo"] = "simpo"
    source: ClassVar[Literal["online", "pairs", "demonstrations"]] = "pairs"
    beta: float = Field(2.0, gt=0, description="of the mean log-probs in the logistic")
    gamma: float = Field(1.6, ge=0, description="the margin that is asked for")

    needs_ref: ClassVar[bool] = False

    def score(self, logp_NT: Tensor, rows: Batch) -> Tensor:
        return rows.seq(logp_NT) / rows.mask_NT.sum(-1).clamp(min=1)

    def pair_loss(self, h: Tensor) -> Tensor:
        return logistic(self.beta * h - self.gamma)
