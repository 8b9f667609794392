"""Online SLiC: the hinge on the DPO margin (Zhao et al. 2023; Guo et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.pairs import Pairs


class SLiC(Pairs):
    """At β = 0.002 the hinge is active until h reaches 500 nats: in practice a constant push."""

    name: Literal["slic"] = "slic"
    beta: float = Field(0.002, gt=0, description="of the log-ratios to π_0 in the hinge")

    def pair_loss(self, h: Tensor) -> Tensor:
        return (1 - self.beta * h).clamp(min=0)
