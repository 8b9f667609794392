"""GRPO: group-relative policy optimisation (Shao et al. 2024, Eq. 3-4), as in ICLR 2026 App. B.3, and its later forms:
DAPO (Yu et al. 2025, arXiv 2503.14476), Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) and GSPO (Zheng et al. 2025, arXiv
2507.18071), each the same loss with other settings."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.advantages import advantages, group_size, group_sum, normalise
from dualign.algos.base import Algorithm, Batch, Columns, Stats

STD_EPS = 1e-4
Scale = Literal["group", "batch", "none"]
Aggregate = Literal["completion", "token", "constant"]


class GRPO(Algorithm):
    """HelpSteer2: β = 0.03. `scale: batch` is DAR's advantage, and that of REINFORCE++-baseline (arXiv 2501.03262)."""

    name: Literal["grpo"] = "grpo"
    beta: float = Field(0.04, ge=0, description="of the KL to π_0")
    clip: float = Field(0.2, gt=0, description="of the ratio π_θ/π_t: at least 1 less this")
    clip_high: float | None = Field(None, gt=0, description="of the ratio: at most 1 plus this; null: as clip")
    ratio: Literal["token", "sequence"] = Field(
        "token", description="π_θ/π_t of each token, or of the sequence: exp of the mean of its tokens' log-ratios"
    )
    scale: Scale = Field("group", description="what divides r - group mean: the group's σ, the batch's, nothing")
    aggregate: Aggregate = Field(
        "completion",
        description="mean over each completion's tokens, then over completions; mean over all tokens of an update; sum "
        "over tokens divided by completions times length",
    )
    length: int = Field(3000, ge=1, description="tokens; what aggregate: constant divides by (Dr. GRPO's budget)")

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
        return relative(batch, self.scale)

    def denominator(self, rows: Batch) -> Tensor:
        if self.aggregate == "token":
            return rows.mask_NT.sum().clamp(min=1)
        return torch.tensor(float(len(rows) * (self.length if self.aggregate == "constant" else 1)))

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        assert rows.logp_old_NT is not None
        mask_NT = rows.mask_NT.to(logp_NT.dtype)
        length_N = mask_NT.sum(-1).clamp(min=1)
        log_ratio_NT = logp_NT - rows.logp_old_NT
        if self.ratio == "sequence":  # (GSPO, Eq. 7): one ratio of all of a completion's tokens
            log_ratio_NT = (rows.seq(log_ratio_NT) / length_N)[:, None].expand_as(logp_NT)
        ratio_NT = log_ratio_NT.exp()
        A_N1 = rows["advantage"][:, None]
        high = self.clip if self.clip_high is None else self.clip_high
        plain_NT, clipped_NT = ratio_NT * A_N1, ratio_NT.clamp(1 - self.clip, 1 + high) * A_N1
        term_NT = -torch.minimum(plain_NT, clipped_NT)
        columns = {"ratio_clipped": ((clipped_NT < plain_NT) * mask_NT).sum(-1) / length_N}
        if self.beta > 0:
            assert rows.logp_ref_NT is not None
            log_ratio_NT = rows.logp_ref_NT - logp_NT
            k3_NT = log_ratio_NT.exp() - log_ratio_NT - 1  # of KL(π_θ ‖ π_0): never negative
            term_NT = term_NT + self.beta * k3_NT
            columns["kl_ref_token"] = (k3_NT.detach() * mask_NT).sum(-1) / length_N
        if self.aggregate == "completion":
            return ((term_NT * mask_NT).sum(-1) / length_N).sum(), columns
        return (term_NT * mask_NT).sum(), columns


def relative(batch: Batch, scale: Scale = "group") -> tuple[Columns, Stats]:
    """A = (r - group mean) / σ: of the group (unbiased, + 1e-4), of the batch as DAR's, or 1; 0 for a row alone in its
    group."""
    centred_N = advantages(batch.reward_N, batch.group_N, "group")
    free_N = (group_size(batch.group_N, centred_N.dtype) - 1).clamp(min=1)
    std_N = (group_sum(centred_N**2, batch.group_N) / free_N).sqrt()
    scaled = {
        "group": lambda: centred_N / (std_N + STD_EPS),
        "batch": lambda: normalise(centred_N)[0],
        "none": lambda: centred_N,
    }
    return {"advantage": scaled[scale]()}, {
        "group_std": float(std_N.mean()),
        "no_signal": float((std_N == 0).float().mean()),  # share of rows whose group is tied
    }


class DAPO(GRPO):
    """Mean over all tokens, a higher upper clip, no KL. Its dynamic sampling and length penalty are not in the loss."""

    name: Literal["dapo"] = "dapo"  # type: ignore[assignment]
    beta: float = Field(0.0, ge=0, description="of the KL to π_0")
    clip_high: float | None = Field(0.28, gt=0, description="of the ratio: at most 1 plus this; null: as clip")
    aggregate: Aggregate = Field("token", description="as grpo's")


class DrGRPO(GRPO):
    """Neither σ nor a completion's own length divides: "done right" is without both biases."""

    name: Literal["dr_grpo"] = "dr_grpo"  # type: ignore[assignment]
    beta: float = Field(0.0, ge=0, description="of the KL to π_0")
    scale: Scale = Field("none", description="as grpo's")
    aggregate: Aggregate = Field("constant", description="as grpo's")


class GSPO(GRPO):
    """One ratio for the whole sequence, in a clip that is narrow as the mean of many tokens is."""

    name: Literal["gspo"] = "gspo"  # type: ignore[assignment]
    beta: float = Field(0.0, ge=0, description="of the KL to π_0")
    clip: float = Field(3e-4, gt=0, description="of the ratio π_θ/π_t: at least 1 less this")
    clip_high: float | None = Field(4e-4, gt=0, description="of the ratio: at most 1 plus this; null: as clip")
    ratio: Literal["token", "sequence"] = Field("sequence", description="as grpo's")
