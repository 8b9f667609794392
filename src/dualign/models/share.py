"""Shares of a parameter that FSDP2 divided over processes: this process's rows of it, and of what belongs to them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def divided(value: Tensor) -> bool:
    """Whether a tensor is divided over processes."""
    return hasattr(value, "full_tensor")  # without an import that takes half a second


def gathered(value: Any) -> Tensor:
    """All of a divided tensor, in all processes, which come here together; others as they are."""
    return value.full_tensor() if divided(value) else value


class Share:
    """Which rows (entries of dimension 0) of a divided parameter this process has. Processes call it together."""

    def __init__(self, parameter: Any) -> None:
        self.parameter, self.rows = parameter, parameter.detach().to_local()
        self.shape, self.mesh, self.placements = parameter.shape, parameter.device_mesh, parameter.placements
        self.group = self.mesh["shard"].get_group()

    def total(self, value: Tensor) -> Tensor:
        """The sum over all shares of `value`, in place."""
        torch.distributed.all_reduce(value, group=self.group)
        return value

    def whole(self, rows: Tensor) -> Tensor:
        """All rows of what these are this process's rows of."""
        from torch.distributed.tensor import DTensor

        shape = torch.Size([self.shape[0], *rows.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        local: Any = DTensor.from_local(rows, self.mesh, self.placements, shape=shape, stride=stride)
        return gathered(local)

    def mine(self, whole: Tensor) -> Tensor:
        """This process's rows."""
        from torch.distributed.tensor import distribute_tensor

        placed: Any = distribute_tensor(whole.to(self.mesh.device_type), self.mesh, self.placements, src_data_rank=None)
        return placed.to_local()


def clip_gradients(masters: Sequence[nn.Parameter], shares: Mapping[nn.Parameter, Share], limit: float) -> float:
    """Scales gradients down where their norm, over the shares of all processes, is above `limit`; returns the norm."""
    if not shares:
        return float(torch.nn.utils.clip_grad_norm_(masters, limit))
    whole, divided = ([p.grad for p in masters if p.grad is not None and (p in shares) is s] for s in (False, True))
    square = sum(torch.linalg.vector_norm(g).double().square() for g in divided)
    square = next(iter(shares.values())).total(torch.as_tensor(square, device=masters[0].device))
    square += sum(torch.linalg.vector_norm(g).double().square() for g in whole)
    norm = float(square.sqrt())
    if math.isfinite(norm):
        torch._foreach_mul_([*divided, *whole], min(1.0, limit / (norm + 1e-6)))  # as torch does
    return norm
