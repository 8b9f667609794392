"""Sampling from the policy. `build` makes the sampler that a run's configuration names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dualign.common.errors import UserError
from dualign.common.named import run_own
from dualign.rollout.own import OwnSampler
from dualign.rollout.settings import ENGINES

if TYPE_CHECKING:
    from dualign.models.policy import Policy
    from dualign.models.tokenizer import Tokenizer
    from dualign.rollout.base import Sampler
    from dualign.rollout.settings import RolloutConfig

__all__ = ["build", "check_room", "close"]


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


def check_room(sampler: Sampler | None, requests: Sequence[Any], new_tokens: int) -> None:
    """Raises UserError, naming the prompt, for one that a sampler with a context of its own has no room to answer."""
    context = getattr(sampler, "context", None) or math.inf
    for request in requests:
        length = len(getattr(request, "prompt_ids", ()))  # rows of a fixed set are not sampled on
        if length + new_tokens > context:
            raise UserError(
                f"prompt {request.prompt.id}: its {length} tokens and {new_tokens} new ones exceed the sampler's context of "
                f"{context}; raise it (max_model_len), or leave such prompts out by data.max_prompt_tokens"
            )


def close(sampler: Sampler | None) -> None:
    """Ends what a sampler has started, where it has something to end."""
    end = getattr(sampler, "close", None)
    if callable(end):
        end()
