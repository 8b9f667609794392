"""Sampling from the policy. `build` makes the sampler that a run's configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dualign.models.policy import Policy
    from dualign.models.tokenizer import Tokenizer
    from dualign.rollout.base import Sampler
    from dualign.rollout.settings import RolloutConfig

__all__ = ["build"]


def build(config: RolloutConfig, policy: Policy, tokenizer: Tokenizer) -> Sampler:
    """What draws completions from π_t, with `policy` as it was loaded: its weights are exact. Raises UserError for a
    model that cannot be sampled from, and where log-probs that were to be recorded are not the model's."""
    return config.options.build(policy, tokenizer, recorded=config.log_probs == "recorded")
