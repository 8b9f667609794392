"""What the systems on pairs share: which two completions of a prompt are compared, and by how much."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from dualign.algos.advantages import best_and_worst, group_sum
from dualign.algos.base import Algorithm, Batch, Columns, Stats


class Pairs(Algorithm):
    """A group's best completion is chosen, its worst rejected (the first of equals); a group without a difference is
    left out. AI-preference labels (1 won, 0 lost, 0.5 undecided; neighbours compared) take the same way: the first
    decided pair's winner is the first 1, its loser the first 0, so the two were indeed compared with each other. Scores
    of all pairs, a tournament or a ranking are rewards like any other: the highest is chosen, the lowest rejected."""

    beta: float

    needs_old: ClassVar[bool] = False
    compares: ClassVar[bool] = True
    without_signal: ClassVar[str] = "no pair is left, and no step is made"

    def prepare(self, batch: Batch) -> tuple[Columns, Stats]:
        best_N, worst_N = best_and_worst(batch.reward_N, batch.group_N)
        role_N = best_N.to(batch.reward_N.dtype) - worst_N.to(batch.reward_N.dtype)  # a tied group's best is its worst
        chosen_N, rejected_N = role_N > 0, role_N < 0
        groups, pairs = int(best_N.sum()), int(chosen_N.sum())
        gap = batch.reward_N[chosen_N].sum() - batch.reward_N[rejected_N].sum()
        return {"role": role_N, "keep": chosen_N | rejected_N}, {
            "pairs": float(pairs),
            "tied_groups": float(groups - pairs),
            "reward_gap": float(gap) / max(pairs, 1),
        }

    def denominator(self, rows: Batch) -> Tensor:
        return (rows["role"] > 0).sum().clamp(min=1)

    def loss(self, logp_NT: Tensor, rows: Batch, value_NT: Tensor | None = None) -> tuple[Tensor, Columns]:
        # h = score(y_w) - score(y_l), at the row of y_w
        h_N = group_sum(rows["role"] * self.score(logp_NT, rows), rows.group_N)
        chosen_N = rows["role"] > 0
        columns = {"margin": self.beta * h_N.detach(), "accuracy": (h_N.detach() > 0).to(h_N.dtype)}
        return self.pair_loss(h_N[chosen_N]).sum(), columns

    def score(self, logp_NT: Tensor, rows: Batch) -> Tensor:
        """(N, T) -> (N,): log π_θ(y|x) - log π_0(y|x), sums over the sequence."""
        return rows.seq(logp_NT) - rows.seq_ref_N

    @abstractmethod
    def pair_loss(self, h: Tensor) -> Tensor:
        """(pairs,) -> (pairs,): the loss of each pair, given how much more its chosen completion scores."""


def logistic(x: Tensor) -> Tensor:
    """-log σ(x), without overflow."""
    return -torch.nn.functional.logsigmoid(x)
