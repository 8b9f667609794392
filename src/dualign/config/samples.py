"""Whether a system can learn from what is sampled for it."""

from __future__ import annotations

from dualign.algos import ALGORITHMS, Algorithm
from dualign.config.sections import TrainConfig
from dualign.rollout.settings import RolloutConfig


def check_samples(algo: Algorithm, rollout: RolloutConfig, train: TrainConfig) -> None:
    """Raises ValueError, naming the key, where it cannot take samples of an older policy, has no use for further prompts,
    or has nothing that the truncated importance of completions could scale or be made of."""
    for key, asked in (("rollout.ahead", rollout.ahead), ("train.reuse", train.reuse)):
        if asked and (algo.source != "online" or not algo.off_policy):
            have = ", ".join(name for name, kind in ALGORITHMS.items() if kind.off_policy)
            raise ValueError(f"{key}: {algo.name} learns only from what π_t sampled; of an older policy: {have}")
    if rollout.resample and (algo.source != "online" or not algo.compares):
        raise ValueError(f"rollout.resample: {algo.name} does not learn from how a prompt's completions differ")
    if rollout.resample and rollout.ahead:
        raise ValueError("rollout.resample: what follows from a batch's labels cannot be sampled ahead (rollout.ahead)")
    if rollout.importance_cap is None:
        return
    if rollout.log_probs == "recorded":
        raise ValueError("rollout.importance_cap: π_t is what the sampler recorded (rollout.log_probs), so it is 1")
    if algo.source != "online" or algo.proportional is None or not algo.needs_old:
        have = ", ".join(name for name, kind in ALGORITHMS.items() if kind.proportional)
        lacks = "does not need log π_t with these settings" if algo.proportional else f"has none; {have} do"
        raise ValueError(f"rollout.importance_cap: {algo.name} {lacks}")
