"""GRPO: group-relative policy optimisation (Shao et al. 2024, Eq. 3-4), as in ICLR 2026 App. B.3."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import advantages, group_size, group_sum
from dualign.algos.base import Algorithm, Batch, Columns, Stats

STD_EPS = 1e-4


class GRPO(Algorithm):
    """HelpSteer2: β = 0.03."""

    name: Literal["grpo"] = "grpo"
    beta: float = Field(0.04, ge=0, description="of the KL to π_0")
    clip: float = Field(0.2, gt=0, description="of the ratio π_θ/π_t")

    compares: ClassVar[bool] = True
    by_prompt: ClassVar[bool] = True
    proportional: ClassVar[str] = "advantage"

    @property
    def needs_ref(self) -> bool:
        return self.beta > 0

    @property
    def without_signal(self) -> str:
        return "only its KL to π_0 moves it" if self.beta else "its gradient is 0"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        # A = (r - group mean) / (group std + 1e-4), std unbiased; 0 for a row alone in its group
        centred_N = advantages(batch.reward_N, batch.group_N, "group")
        free_N = (group_size(batch.group_N, centred_N.dtype) - 1).clamp(min=1)
        std_N = (group_sum(centred_N**2, batch.group_N) / free_N).sqrt()
        return {"advantage": centred_N / (std_N + STD_EPS)}, {
            "group_std": float(std_N.mean()),
            "no_signal": float((std_N == 0).float().mean()),  # share of rows whose group is tied
        }

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        assert rows.logp_old_NT is not None
        mask_NT = rows.mask_NT.to(logp_NT.dtype)
        length_N = mask_NT.sum(-1).clamp(min=1)
        ratio_NT = (logp_NT - rows.logp_old_NT).exp()
        A_N1 = rows["advantage"][:, None]
        plain_NT, clipped_NT = ratio_NT * A_N1, ratio_NT.clamp(1 - self.clip, 1 + self.clip) * A_N1
        term_NT = -torch.minimum(plain_NT, clipped_NT)
        columns = {"ratio_clipped": ((clipped_NT < plain_NT) * mask_NT).sum(-1) / length_N}
        if self.beta > 0:
            assert rows.logp_ref_NT is not None
            log_ratio_NT = rows.logp_ref_NT - logp_NT
            k3_NT = log_ratio_NT.exp() - log_ratio_NT - 1  # of KL(π_θ ‖ π_0): never negative
            term_NT = term_NT + self.beta * k3_NT
            columns["kl_ref_token"] = (k3_NT.detach() * mask_NT).sum(-1) / length_N
        return ((term_NT * mask_NT).sum(-1) / length_N).sum(), columns
