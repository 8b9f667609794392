"""The section `rollout` of a run's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator

from dualign.common.errors import UserError
from dualign.common.named import class_of
from dualign.common.settings import Settings

if TYPE_CHECKING:
    from dualign.models.policy import Policy
    from dualign.models.tokenizer import Tokenizer
    from dualign.rollout.base import Sampler


class SamplerSettings(Settings):
    """What an engine is set up with. One of your own is a subclass with fields and `build`."""

    def check(self) -> None:
        """For --dry-run: raises UserError for what is wrong, without a model."""

    def build(self, policy: Policy, tokenizer: Tokenizer, recorded: bool) -> Sampler:
        """A sampler for `policy`, whose weights are still as they were loaded. `recorded`: whether its log-probs are to
        be log π_t (rollout.log_probs)."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


class HFSettings(SamplerSettings):
    decode_batch_size: int = Field(256, ge=1, description="completions decoded side by side in one process")
    cuda_graphs: bool = Field(True, description="on a GPU, replay the steps of decoding as CUDA graphs")

    def build(self, policy: Policy, tokenizer: Tokenizer, recorded: bool) -> Sampler:
        from dualign.rollout.hf.sampler import HFSampler, decoding_of

        if not decoding_of(policy).agrees and recorded:
            raise UserError(
                f"rollout.log_probs: recorded: {policy.name}: the log-probs of decoding were not shown to be the model's; "
                "set rollout.log_probs=recomputed"
            )
        return HFSampler(policy, tokenizer, self.decode_batch_size, self.cuda_graphs)


ENGINES: dict[str, type[SamplerSettings]] = {"hf": HFSettings}


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
    engine: str = Field("hf", description="what samples: hf (transformers), or one of your own: FILE.py:NAME")
    options: SerializeAsAny[SamplerSettings] = Field(
        default_factory=dict, validate_default=True, description="settings of the engine"
    )
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

    @field_validator("engine")
    @classmethod
    def _is_known(cls, engine: str) -> str:
        class_of(engine, ENGINES, SamplerSettings)
        return engine

    @field_validator("options", mode="before")
    @classmethod
    def _of_engine(cls, options: Any, info: ValidationInfo) -> Any:
        if isinstance(options, SamplerSettings) or "engine" not in info.data:
            return options or SamplerSettings()
        return class_of(info.data["engine"], ENGINES, SamplerSettings).model_validate(options)
