"""Online IPO (Azar et al. 2024, Eq. 17, whose τ is our β; Guo et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from dualign.algos.pairs import Pairs


class IPO(Pairs):
    """Pulls h, the difference of the two log-ratios, to 1/(2β). Sequence sums, so the target is in nats of a whole
    completion: 0.5 at β = 1 (ICLR's, after Guo et al.), 5 at β = 0.1 (arXiv v1's). A larger β stays nearer π_0."""

    name: Literal["ipo"] = "ipo"
    beta: float = Field(1.0, gt=0, description="the target is 1/(2β) nats: larger stays nearer π_0")

    def pair_loss(self, h: Tensor) -> Tensor:
        return (h - 1 / (2 * self.beta)) ** 2
