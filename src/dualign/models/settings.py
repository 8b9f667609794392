"""The section `model` of a run's configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from dualign.common import cpu
from dualign.common.settings import Settings


class LoraConfig(Settings):
    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale, divided by r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="the layers that get adapters")
    quantize: Literal["nf4"] | None = Field(
        None, description="the linear layers under the adapters in 4 bits (QLoRA); π_0 is that model"
    )
    value_model: Literal["adapters", "whole"] = Field(
        "adapters",
        description="what PPO trains of its value model, beside its head: adapters of its own, or all weights",
    )


class ModelConfig(Settings):
    """The policy. π_0 is this model as loaded, frozen, unless `reference` names another."""

    PATHS: ClassVar[tuple[str, ...]] = ("name", "reference", "chat_template")
    name: str = Field(
        description="an embedded default (smollm2-135m-instruct), a local folder, a hub name, or a run: RUN is its last "
        "checkpoint, RUN@best the best by its witness, RUN@3 that after 3 online batches"
    )
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    reference: str | None = Field(
        None, description="π_0, where it is not the model that training starts from; of the same tokens"
    )
    reference_revision: str | None = Field(None, description="its branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; only if you trust it")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "bf16",
        description="bf16: autocast with fp32 master weights and reductions; fp32: everything; auto: bf16 where the "
        "machine has units for it, else fp32 (a run keeps what it began with)",
    )
    attention: Literal["sdpa", "eager", "flash_attention_2"] = Field(
        "sdpa", description="prompts are computed once for their K completions with sdpa alone"
    )
    chat_template: str | None = Field(None, description="a Jinja file, for models that come without one")
    lora: LoraConfig | None = Field(
        None, description="train adapters instead of the weights; {}: with the defaults below"
    )
    gradient_checkpointing: bool = Field(
        False, description="activations are made again in the backward pass: slower, smaller"
    )

    @field_validator("precision")
    @classmethod
    def _of_machine(cls, precision: str, info: ValidationInfo) -> str:
        if precision != "auto":
            return precision
        known = (info.context or {}).get("bf16")  # of a machine that is planned for
        return "bf16" if (cpu.bf16_units() if known is None else known) else "fp32"
