"""PPO's value model: its own transformer, initialised from the policy, with a scalar head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dualign.models.load import copied
from dualign.models.packing import MicroBatch
from dualign.models.policy import Policy


class Critic(Policy):
    """`forward(micro_batch)` gives V(x, y_<k), the value before each completion token, (n, T), 0 beyond the end.

    The head starts at zero, so that the first values are 0 and the first advantages are the rewards to go. Of a policy
    with adapters it has copies and trains them; `whole`: all of its weights instead. `shared`: weights that neither
    trains are the policy's own. Copies are `where`, or beside the policy's.
    """

    def __init__(
        self, policy: Policy, whole: bool = True, shared: bool = False, where: torch.device | None = None
    ) -> None:
        nn.Module.__init__(self)
        self.key, self.precision, self.share, self.flash = policy.key, policy.precision, policy.share, policy.flash
        frozen = {} if whole or not shared else {id(p): p for p in policy.base.parameters() if not p.requires_grad}
        decoder: Any = copied(policy.base, frozen, where)
        self.model = self.base = decoder.requires_grad_(True) if whole else decoder
        self.head = None
        self.value = nn.Linear(policy.width(), 1)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.value.bias)

    def forward(self, micro: MicroBatch) -> Tensor:
        with self.autocast():
            hidden_MH = self.hidden(micro)
        with torch.autocast(hidden_MH.device.type, enabled=False):
            return micro.scatter(self.value(hidden_MH.float())[:, 0])

    @property
    def _head_weight(self) -> Tensor | None:
        return self.value.weight
