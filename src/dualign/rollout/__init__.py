"""Sampling from the policy. `build` makes the sampler that a run's configuration names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dualign.common.errors import UserError
from dualign.common.named import run_own
from dualign.rollout.own import OwnSampler
from dualign.rollout.settings import ENGINES

if TYPE_CHECKING:
    from dualign.models.policy import Policy
    from dualign.models.tokenizer import Tokenizer
    from dualign.rollout.base import Sampler
    from dualign.rollout.settings import RolloutConfig

__all__ = ["build"]


def build(config: RolloutConfig, policy: Policy, tokenizer: Tokenizer, given: Sampler | None = None) -> Sampler:
    """What draws completions from π_t, with `policy` as it was loaded: its weights are exact. `given`: by Python, in
    place of the engine. Raises UserError for a model that cannot be sampled from, and where log-probs that were to be
    recorded are not the model's."""
    recorded = config.log_probs == "recorded"
    if given is not None:
        return OwnSampler(type(given).__qualname__, given, recorded)
    if config.engine in ENGINES:
        return config.options.build(policy, tokenizer, recorded)
    sampler = run_own(f"rollout.engine {config.engine}", lambda: config.options.build(policy, tokenizer, recorded))
    if not (callable(getattr(sampler, "sample", None)) and callable(getattr(sampler, "sync", None))):
        raise UserError(f"rollout.engine: build of {config.engine} gave no sampler: it has no sample and sync")
    return OwnSampler(config.engine, sampler, recorded)
