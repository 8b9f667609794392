"""PPO (Schulman et al. 2017) at token level with a critic, as in ICLR 2026 App. B.3: the scalar reward at the last
token, the KL to π_0 as a reward of every token, GAE, clipped ratio and clipped value."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from dualign.algos.base import Algorithm, Batch, Columns, Stats


class PPO(Algorithm):
    name: Literal["ppo"] = "ppo"
    critic: ClassVar[bool] = True
    epochs: int = Field(4, ge=1, description="passes over each online batch")
    beta: float = Field(0.03, ge=0, description="of the KL penalty in the reward of every token")
    clip: float | None = Field(0.2, gt=0, description="of the ratio π_θ/π_t; null: none")
    value_clip: float = Field(0.2, gt=0, description="of a value's change since sampling")
    vf_coef: float = Field(10.0, ge=0, description="of the value loss")
    gamma: float = Field(1.0, ge=0, le=1, description="discount")
    lam: float = Field(0.95, ge=0, le=1, description="of GAE")
    missing_eos_penalty: float = Field(1.0, ge=0, description="off the reward of a completion that was cut off")

    without_signal: ClassVar[str] = "only its KL to the references and the value model's errors move it"

    @property
    def needs_ref(self) -> bool:
        return self.beta > 0

    def has_signal(self, batch: Batch) -> bool:
        return super().has_signal(replace(batch, reward_N=self.reward_of(batch)))

    def reward_of(self, rows: Batch) -> Tensor:
        """The reward, less the penalty of a completion that was cut off. (N,)"""
        if rows.missing_eos_N is None:
            return rows.reward_N
        return rows.reward_N - self.missing_eos_penalty * rows.missing_eos_N.to(rows.reward_N.dtype)

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        assert batch.logp_old_NT is not None and batch.value_old_NT is not None
        columns = self.estimate(batch, batch.logp_old_NT)  # π_θ = π_t at a batch's first update
        token_NT = batch.mask_NT > 0
        returns, value = columns["returns"][token_NT], batch.value_old_NT[token_NT]
        spread = returns.var(unbiased=False)
        explained = 1 - (returns - value).var(unbiased=False) / spread if spread > 0 else spread
        return columns, {"returns": float(returns.mean()), "value_explained": float(explained)}

    def estimate(self, rows: Batch, logp_NT: Tensor) -> Columns:
        """Advantages, whitened over all tokens of `rows`, and returns, for the policy that gives `logp_NT`. (N, T)"""
        assert rows.value_old_NT is not None
        mask_NT = rows.mask_NT.to(logp_NT.dtype)
        reward_N = self.reward_of(rows)
        # r_k = -β · penalty_k, and the scalar reward at the last token
        last_N1 = (rows.mask_NT.sum(-1, keepdim=True).long() - 1).clamp(min=0)
        reward_NT = (-self.beta * self.penalty(rows, logp_NT)).scatter_add(1, last_N1, reward_N[:, None]) * mask_NT
        value_NT = rows.value_old_NT * mask_NT
        advantage_NT = gae(reward_NT, value_NT, self.gamma, self.lam) * mask_NT
        return {"advantage": whiten(advantage_NT, mask_NT), "returns": advantage_NT + value_NT}

    def penalty(self, rows: Batch, logp_NT: Tensor) -> Tensor:
        """log(π_t/π_0) of each token, whatever the current policy. (N, T)"""
        if not self.needs_ref:
            return torch.zeros_like(logp_NT)
        assert rows.logp_old_NT is not None and rows.logp_ref_NT is not None
        return rows.logp_old_NT - rows.logp_ref_NT

    def denominator(self, rows: Batch) -> Tensor:
        return rows.mask_NT.sum().clamp(min=1)

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        assert value_NT is not None and rows.logp_old_NT is not None and rows.value_old_NT is not None
        mask_NT = rows.mask_NT.to(logp_NT.dtype)
        length_N = mask_NT.sum(-1).clamp(min=1)
        # policy: -min(ρ A, clip(ρ, 1-ε, 1+ε) A)                                       (Schulman et al., Eq. 7)
        ratio_NT = (logp_NT - rows.logp_old_NT).exp()
        policy_NT = -ratio_NT * rows["advantage"]
        columns: Columns = {}
        if self.clip is not None:
            clipped_NT = -ratio_NT.clamp(1 - self.clip, 1 + self.clip) * rows["advantage"]
            columns["ratio_clipped"] = ((clipped_NT > policy_NT) * mask_NT).sum(-1) / length_N
            policy_NT = torch.maximum(policy_NT, clipped_NT)
        # value: ½ max((V - R)², (clip(V, V_old ± ε) - R)²)
        near_NT = rows.value_old_NT + (value_NT - rows.value_old_NT).clamp(-self.value_clip, self.value_clip)
        error_NT = torch.maximum((value_NT - rows["returns"]) ** 2, (near_NT - rows["returns"]) ** 2)
        value_loss_NT = 0.5 * error_NT * mask_NT
        columns["value_loss"] = value_loss_NT.detach().sum(-1) / length_N  # mean over the completion's tokens
        return (policy_NT * mask_NT).sum() + self.vf_coef * value_loss_NT.sum(), columns


def gae(reward_NT: Tensor, value_NT: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16). (N, T)

    A_k = δ_k + γλ A_{k+1} with δ_k = r_k + γ V_{k+1} - V_k; past the last token everything is 0 (both inputs must be),
    also where the completion was cut off.
    """
    advantage_NT = torch.zeros_like(reward_NT)
    A_N = next_value_N = torch.zeros_like(reward_NT[:, 0])
    for k in reversed(range(reward_NT.shape[1])):
        A_N = reward_NT[:, k] + gamma * next_value_N - value_NT[:, k] + gamma * lam * A_N
        advantage_NT[:, k] = A_N
        next_value_N = value_NT[:, k]
    return advantage_NT


def whiten(x_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Zero mean and unit (unbiased) variance over all tokens; 0 where there is no token. (N, T)"""
    count = mask_NT.sum()
    mean = (x_NT * mask_NT).sum() / count
    variance = ((x_NT - mean) ** 2 * mask_NT).sum() / (count - 1).clamp(min=1)
    return (x_NT - mean) * (variance + 1e-8).rsqrt() * mask_NT
