"""A system of one's own: reward-weighted regression with a baseline, w = max(0, 1 + scale (r - mean)).

dualign train quickstart algo.name=examples/system.py:LinearlyWeighted algo.scale=0.5
"""

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from dualign import Algorithm, Batch
from dualign.algos.advantages import advantages


class LinearlyWeighted(Algorithm):
    scale: float = Field(1.0, gt=0, description="of the advantage in a weight")

    needs_ref: ClassVar[bool] = False
    needs_old: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    without_signal: ClassVar[str] = "all weights are 1: SFT on its own samples"

    def prepare(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, float]]:
        A_N = advantages(batch.reward_N, batch.group_N, "group")
        weight_N = (1 + self.scale * A_N).clamp(min=0)
        return {"weight": weight_N}, {"weight_mean": float(weight_N.mean())}

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return -(rows["weight"] * rows.seq(logp_NT)).sum(), {}
