"""KL(π_θ‖π_0) of the next token's whole distributions, where a policy would give the log-prob of one token."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from dualign.models.packing import MicroBatch
from dualign.models.policy import Policy, inputs_of

CHUNK = 512  # positions whose distributions are held at a time


class Divergence:
    """Scores as a policy does. Summed over the tokens of a completion of π_θ and averaged over completions, it estimates
    the KL of whole completions without bias, and with far less noise than log π_θ/π_0 of the tokens that happened to be
    sampled: only what comes before a token is drawn (Rao-Blackwell)."""

    def __init__(self, policy: Policy, reference: Policy | None) -> None:
        self.policy, self.reference = policy, reference
        self.pack, self.train, self.eval = policy.pack, policy.train, policy.eval

    @property
    def training(self) -> bool:
        return self.policy.training

    def __call__(self, micro: MicroBatch) -> Tensor:
        """(n, T), 0 beyond each completion's end."""
        reference, found = self.reference or self.policy, []
        with self.policy.autocast():
            said = _read(self.policy, micro)
            with self._at_reference():
                for ours, theirs in zip(said.split(CHUNK), _read(reference, micro).split(CHUNK), strict=True):
                    p_CV, q_CV = _log_probs(self.policy, ours), _log_probs(reference, theirs)
                    found.append((p_CV.exp() * (p_CV - q_CV)).sum(-1))
        return micro.scatter(torch.cat(found))

    def _at_reference(self) -> AbstractContextManager[None]:
        return self.reference.whole() if self.reference else self.policy.model.disable_adapter()


def _read(policy: Policy, micro: MicroBatch) -> Tensor:
    """At each position that is scored, what the head reads, (M, H); or where it is more than a product, the logits."""
    if policy.plain_head:
        return policy.hidden(micro)
    return policy.model(**inputs_of(micro)).logits.flatten(0, 1).index_select(0, micro.predictor_M)


def _log_probs(policy: Policy, read_CX: Tensor) -> Tensor:
    """(C, V) log π of every token of the vocabulary, in fp32."""
    if policy.plain_head:
        head_VH = policy.rounded_head()
        read_CX = read_CX.to(head_VH.dtype) @ head_VH.T
    return torch.log_softmax(read_CX.float(), -1)
