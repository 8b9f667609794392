"""The optimizer, and its learning rate over a run."""

from __future__ import annotations

import math
from typing import Any

import torch

from dualign.config import Config
from dualign.models.master import Masters
from dualign.training.adafactor import Adafactor

TOGETHER = 2**27  # entries of weights of one shape that a GPU steps on at once


def make_optimizer(config: Config, masters: Masters, device: torch.device) -> Any:
    """Adafactor or AdamW, with one group of parameters for the policy and one for the critic."""
    t = config.train
    rates = [t.lr, t.critic_lr or t.lr]
    groups = [{"params": parameters, "lr": lr} for parameters, lr in zip(masters.groups, rates, strict=False)]
    if t.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=t.lr, weight_decay=t.weight_decay, fused=True)
    return Adafactor(
        groups, t.lr, t.weight_decay, masters.opened, 1 if device.type == "cpu" else TOGETHER, masters.shares
    )


class Schedule:
    """The learning rate as a function of an update's place in the run: a linear rise, constant, a fall to 0, linear or
    as half a cosine."""

    def __init__(self, config: Config, optimizer: Any) -> None:
        self.config, self.optimizer = config, optimizer
        self.rates = [group["lr"] for group in optimizer.param_groups]

    def set(self, step: int, update: int) -> None:
        """For update `update` of online batch `step`. A batch with further prompts (rollout.resample) may have more
        updates than its place in the run: they keep the rate of the last that has one."""
        planned = self.config.updates_per_batch
        share = self.share(step * planned + min(update, planned - 1))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * share

    def share(self, at: int) -> float:
        """Of the learning rate, in update `at` of the run."""
        t = self.config.train
        updates = t.online_batches * self.config.updates_per_batch
        falling = t.falling * updates
        left = min(1.0, (updates - at) / falling) if falling else 1.0
        if t.schedule == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return min(1.0, (at + 1) / max(1, t.warmup), left)
