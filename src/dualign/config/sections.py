"""The sections `train`, `eval` and `run` of a run's configuration."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dualign.annotate.registry import RewardConfig
from dualign.annotate.settings import RewardSettings
from dualign.common.settings import Settings


class TrainConfig(Settings):
    """Counts are completions, as the papers count them."""

    online_batches: int = Field(ge=0, description="how long the run is")
    online_batch: int = Field(64, ge=1, description="completions sampled from one π_t (paper: 512)")
    update_size: int = Field(32, ge=1, description="completions of one optimizer step (paper: 128)")
    micro_batch_tokens: int = Field(
        4096,
        ge=16,
        description="tokens of one forward and backward pass (a CPU scores four times as many at once); only memory and "
        "speed depend on it",
    )
    prefix_sharing: bool = Field(True, description="compute a prompt once for its K completions")
    shard: Literal["none", "full", "hybrid"] = Field(
        "none",
        description="over several processes, what each holds of weights, gradients and optimizer state: all (none), its "
        "share (full), or its share among those of its node (hybrid)",
    )
    compile: bool = Field(True, description="on a GPU, compile the layers of models that share prompts")
    optimizer: Literal["adafactor", "adamw"] = Field(
        "adafactor", description="Adafactor without momentum or relative steps (papers), or AdamW"
    )
    lr: float = Field(1e-6, gt=0, description="learning rate")
    critic_lr: float | None = Field(None, gt=0, description="of the value model; default: lr")
    warmup: int = Field(15, ge=0, description="updates of linear warm-up; then the rate is constant (papers)")
    schedule: Literal["constant", "linear", "cosine"] | None = Field(
        None, description="after warm-up: constant, or a fall to 0 of this shape; none: constant, or linear with decay"
    )
    decay: float = Field(
        0.0, ge=0, le=1, description="share of the updates, the last, in which it falls; 0 with a fall: all of them"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled, times the learning rate")
    max_grad_norm: float = Field(1.0, gt=0, description="a larger gradient is scaled down to it")
    reuse: list[Annotated[int, Field(ge=1)]] = Field(
        default_factory=list,
        description="train again on earlier batches, by their ages: [4] on that of four batches ago, [1, 2, 3] on the "
        "last three; their labels are there, and their weights are made anew for the policy of now",
    )
    no_signal: Literal["train", "skip"] = Field(
        "train",
        description="a batch whose rewards tell no completion from another: make the system's step all the same (of DAR: "
        "SFT on its own samples, pulled to π_0), or leave it out",
    )
    max_absent: float = Field(
        0.2, ge=0, le=1, description="stop when a larger share of a batch or an evaluation has no label"
    )

    @model_validator(mode="after")
    def _falls(self) -> Self:
        if self.schedule == "constant" and self.decay:
            raise ValueError("schedule: constant does not fall, so decay must be 0; linear and cosine fall")
        return self

    @property
    def falling(self) -> float:
        """The share of the updates, the last, in which the rate falls."""
        return self.decay or float(self.schedule in ("linear", "cosine"))


class EvalConfig(Settings):
    prompts: int = Field(64, ge=1, description="held-out prompts, at most")
    k: int = Field(1, ge=1, description="completions per held-out prompt")
    every: int = Field(0, ge=0, description="evaluate each so many online batches; 0: only before and after")
    temperature: float | None = Field(None, ge=0, description="default: the rollouts'")
    kl: Literal["sampled", "exact"] = Field(
        "sampled",
        description="KL to π_0 on held-out prompts: log π/π_0 of the tokens that were sampled, or at each of them the sum "
        "over the vocabulary (far less noise, two more products with the head)",
    )


class RunConfig(Settings):
    PATHS: ClassVar[tuple[str, ...]] = ("dir",)
    dir: str = Field("runs/run", description="the run's folder")
    seed: int = Field(0, ge=0, lt=2**32, description="of sampling, shuffling and dropout")
    checkpoints: int = Field(
        10, ge=1, description="how many over the run, at equal distances; the last batch always has one"
    )
    preview: int = Field(
        3, ge=0, description="labels that are bought and shown before a run that asks a judge; 0: none"
    )
    keep_last: int | None = Field(None, ge=1, description="how many checkpoints to keep; none: all")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list,
        description="where numbers are sent beside metrics.jsonl; TensorBoard's are in RUN/trackers",
    )
    project: str = Field("dualign", description="the trackers' name for it")


class WitnessConfig(Settings):
    """A second judge or reward that is asked and never trained on."""

    reward: list[RewardConfig] = Field(
        min_length=1, description="what is asked: a reward, or a list that is summed, with the keys of reward.N"
    )
    every: int = Field(4, ge=1, description="ask about each so many online batches, π_0's own (batch 0) among them")
    sample: int = Field(16, ge=1, description="completions of such a batch; four times as many of π_0's")
    heldout: int = Field(64, ge=0, description="held-out answers of each evaluation")
    alpha: float = Field(
        0.05, gt=0, lt=1, description="the chance, over the run, to say by mistake that reward and witness part"
    )
    stop: bool = Field(False, description="when they part, stop cleanly (exit code 3); a resume goes on")

    @field_validator("reward")
    @classmethod
    def _has_a_mean(cls, rewards: list[RewardSettings]) -> list[RewardSettings]:
        if any(reward.compares for reward in rewards):
            raise ValueError(
                "a preference compares completions of one prompt: its mean never changes, so it sees nothing"
            )
        return rewards
