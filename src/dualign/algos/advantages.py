"""Baselines and normalisation, over the whole online batch (all processes)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-8

Baseline = Literal["group", "batch", "none"]


def group_sum(x_N: Tensor, group_N: Tensor) -> Tensor:
    """Each row's sum of `x_N` over the rows of its group. (N,) -> (N,). Group numbers need not be contiguous."""
    _, index_N = torch.unique(group_N, return_inverse=True)
    total_P = torch.zeros(int(index_N.max()) + 1 if len(index_N) else 0, dtype=x_N.dtype, device=x_N.device)
    return total_P.index_add(0, index_N, x_N)[index_N]


def group_size(group_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's number of rows in its group. (N,)"""
    return group_sum(torch.ones(len(group_N), dtype=dtype, device=group_N.device), group_N)


def group_mean(x_N: Tensor, group_N: Tensor) -> Tensor:
    """Each row's mean of `x_N` over its group. (N,)"""
    return group_sum(x_N, group_N) / group_size(group_N, x_N.dtype)


def advantages(reward_N: Tensor, group_N: Tensor, baseline: Baseline) -> Tensor:
    """A_i = r_i - baseline (ICLR Alg. 1): the group's mean, the batch's mean, or nothing. (N,)"""
    if baseline == "group":
        return reward_N - group_mean(reward_N, group_N)
    return reward_N - reward_N.mean() if baseline == "batch" else reward_N.clone()


def normalise(advantage_N: Tensor) -> tuple[Tensor, Tensor]:
    """(A - μ_A) / σ_A with the unbiased σ_A over the batch (ICLR Alg. 1), and σ_A.

    σ_A = 0 (all equal, or a single row) gives A_norm = 0 exactly: there is nothing to prefer. Rounding must not be
    mistaken for signal, so a σ_A below the rounding of the numbers themselves counts as 0.
    """
    if len(advantage_N) < 2:
        return torch.zeros_like(advantage_N), advantage_N.new_zeros(())
    sigma = advantage_N.std(unbiased=True)
    floor = 8 * torch.finfo(advantage_N.dtype).eps * advantage_N.abs().max()
    if sigma <= floor:
        return torch.zeros_like(advantage_N), advantage_N.new_zeros(())
    return (advantage_N - advantage_N.mean()) / (sigma + EPS), sigma
