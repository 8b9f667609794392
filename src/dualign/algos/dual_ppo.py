"""Dual-PPO: PPO whose per-token penalty holds π_θ to both π_0 and π_t (ICLR 2026, Sec. 4.1, App. B.3 and C.4).

The penalty is of the current policy, which has left π_t from a batch's second update on: the advantages are computed
anew before every update, without gradient.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.base import Batch, Columns
from dualign.algos.ppo import PPO


class DualPPO(PPO):
    """One epoch, no clip of the ratio. Learning rate 3e-6."""

    name: Literal["dual_ppo"] = "dual_ppo"  # type: ignore[assignment]
    recompute: ClassVar[bool] = True
    epochs: int = Field(1, ge=1, description="passes over each online batch")
    alpha: float = Field(0.3, ge=0, le=1, description="of the two references, π_0 and π_t, how much π_0")
    beta: float = Field(0.02, ge=0, description="of the penalty in the reward of every token")
    clip: float | None = Field(None, gt=0, description="of the ratio π_θ/π_t; null: none")

    @property
    def needs_ref(self) -> bool:
        return self.alpha > 0 and self.beta > 0

    def refresh(self, rows: Batch, logp_NT: Tensor, value_NT: Tensor | None) -> Columns:
        return self.estimate(rows, logp_NT)

    def penalty(self, rows: Batch, logp_NT: Tensor) -> Tensor:
        """α log(π_θ/π_0) + (1-α) · (the pull to π_t), per token. (N, T)"""
        assert rows.logp_old_NT is not None
        to_ref_NT = torch.zeros_like(logp_NT)
        if self.needs_ref:
            assert rows.logp_ref_NT is not None
            to_ref_NT = logp_NT - rows.logp_ref_NT
        return self.alpha * to_ref_NT + (1 - self.alpha) * self.to_old(logp_NT - rows.logp_old_NT)

    def to_old(self, log_ratio_NT: Tensor) -> Tensor:
        """log(π_θ/π_t): the reverse KL. (N, T)"""
        return log_ratio_NT


class DualPPOClip(DualPPO):
    name: Literal["dual_ppo_clip"] = "dual_ppo_clip"  # type: ignore[assignment]
    alpha: float = Field(0.9, ge=0, le=1, description="of the two references, π_0 and π_t, how much π_0")
    beta: float = Field(0.01, ge=0, description="of the penalty in the reward of every token")
    clip: float | None = Field(0.2, gt=0, description="of the ratio π_θ/π_t; null: none")


class DualMixPPO(DualPPO):
    """The pull to π_t by the forward KL (Eq. 9)."""

    name: Literal["dual_mix_ppo"] = "dual_mix_ppo"  # type: ignore[assignment]

    def to_old(self, log_ratio_NT: Tensor) -> Tensor:
        """(π_t/π_θ) log(π_t/π_θ). (N, T)"""
        return -log_ratio_NT * (-log_ratio_NT).exp()
