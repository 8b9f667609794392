"""DPO (Rafailov et al. 2023, Eq. 7): online, on the policy's own completions (Guo et al. 2024), and offline."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.pairs import Pairs, logistic


class DPO(Pairs):
    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="of the log-ratios to π_0 in the logistic")

    off_policy: ClassVar[bool] = True  # π* orders any two completions as their labels do, whoever sampled them

    def pair_loss(self, h: Tensor) -> Tensor:
        return logistic(self.beta * h)


class OfflineDPO(DPO):
    """On a fixed preference set."""

    name: Literal["offline_dpo"] = "offline_dpo"  # type: ignore[assignment]
    source: ClassVar[Literal["online", "pairs", "demonstrations"]] = "pairs"
    off_policy: ClassVar[bool] = False  # its pairs were sampled by no policy of the run
