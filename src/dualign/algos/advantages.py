"""Baselines and normalisation, over the whole online batch (all processes)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPS = 1e-8

Baseline = Literal["group", "batch", "none"]


def group_sum(x_N: Tensor, group_N: Tensor) -> Tensor:
    """Each row's sum of `x_N` over the rows of its group. (N,) -> (N,). Group numbers need not be contiguous."""
    group_P, index_N = torch.unique(group_N, return_inverse=True)
    return x_N.new_zeros(len(group_P)).index_add(0, index_N, x_N)[index_N]


def group_size(group_N: Tensor, dtype: torch.dtype) -> Tensor:
    """Each row's number of rows in its group. (N,)"""
    return group_sum(torch.ones(len(group_N), dtype=dtype, device=group_N.device), group_N)


def group_mean(x_N: Tensor, group_N: Tensor) -> Tensor:
    """Each row's mean of `x_N` over its group. (N,)"""
    return group_sum(x_N, group_N) / group_size(group_N, x_N.dtype)


def advantages(reward_N: Tensor, group_N: Tensor, baseline: Baseline) -> Tensor:
    """A_i = r_i - baseline (ICLR Alg. 1): the group's mean, the batch's mean, or nothing. (N,)

    A difference within the rounding of a mean is 0: four rewards of 0.1 are tied, though their mean in floating point
    is not quite 0.1, and `normalise` would blow that up to a signal.
    """
    if baseline == "none":
        return reward_N.clone()
    mean_N = reward_N.mean().expand_as(reward_N) if baseline == "batch" else group_mean(reward_N, group_N)
    advantage_N = reward_N - mean_N
    rounding_N = 8 * torch.finfo(reward_N.dtype).eps * mean_N.abs()
    return advantage_N.masked_fill(advantage_N.abs() <= rounding_N, 0.0)


def best_and_worst(reward_N: Tensor, group_N: Tensor) -> tuple[Tensor, Tensor]:
    """The row of each group with the highest and with the lowest reward, the first of equals. Two bool (N,)."""

    def first(hit_N: Tensor) -> Tensor:
        position_N = torch.arange(len(hit_N), device=hit_N.device)
        candidate_N = torch.where(hit_N, position_N, len(hit_N))
        return position_N == group_extreme(candidate_N, group_N, "amin")

    return (
        first(reward_N == group_extreme(reward_N, group_N, "amax")),
        first(reward_N == group_extreme(reward_N, group_N, "amin")),
    )


def group_extreme(x_N: Tensor, group_N: Tensor, reduce: Literal["amax", "amin"]) -> Tensor:
    """Each row's largest or smallest `x_N` of its group. (N,)"""
    group_P, index_N = torch.unique(group_N, return_inverse=True)
    extreme_P = x_N.new_zeros(len(group_P)).scatter_reduce(0, index_N, x_N, reduce, include_self=False)
    return extreme_P[index_N]


def tied_rows(reward_N: Tensor, group_N: Tensor, tie: float = 0.0) -> Tensor:
    """Whether a row's group has two rows or more, and all its rewards within `tie` of each other. bool (N,)"""
    spread_N = group_extreme(reward_N, group_N, "amax") - group_extreme(reward_N, group_N, "amin")
    return (spread_N <= tie * (1 + 1e-9)) & (group_size(group_N, reward_N.dtype) > 1)  # 0.8 - 0.3 is 0.5


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
