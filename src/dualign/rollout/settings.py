"""The section `rollout` of a run's configuration."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dualign.common.settings import Settings


class RolloutConfig(Settings):
    k: int = Field(4, ge=1, description="completions per prompt (the papers' K)")
    max_new_tokens: int = Field(64, ge=1, description="tokens of a completion, at most")
    temperature: float = Field(
        0.9, ge=0, description="of sampling; 0: greedy. Log-probs in weights and losses are at 1"
    )
    top_p: float = Field(1.0, gt=0, le=1, description="sample from the most likely tokens that hold this share")
    missing_eos_penalty: float = Field(
        0.0, ge=0, description="subtracted from the training reward of a completion cut off at max_new_tokens"
    )
    rows: int = Field(256, ge=1, description="completions decoded side by side in one process")
    log_probs: Literal["recomputed", "recorded"] = Field(
        "recomputed",
        description="log π_t from the policy once more (of the rows of the first update, from that update's own pass), or "
        "as the sampler recorded it: less work, and off by the rounding between one token at a time and all at once",
    )
    max_sampler_gap: float | None = Field(
        None,
        gt=0,
        description="nats a token, on average over a batch, by which the sampler's log-probs may differ from the policy's; "
        "more stops the run. None: what rounding explains on this model",
    )
    cuda_graphs: bool = Field(True, description="on a GPU, replay the steps of decoding as CUDA graphs")
