"""The sections of a run's configuration, each strict: an unknown key is an error. Defaults are the vetted setting."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dualign.annotate.settings import RewardConfig, Settings


class LoraConfig(Settings):
    r: int = Field(16, ge=1, description="rank")
    alpha: int = Field(32, ge=1, description="scale, divided by r")
    dropout: float = Field(0.0, ge=0, lt=1, description="of the adapters' input")
    target_modules: list[str] | Literal["all-linear"] = Field("all-linear", description="the layers that get adapters")


class ModelConfig(Settings):
    """The policy. π_0 is this model as loaded, frozen, unless `reference` names another."""

    PATHS: ClassVar[tuple[str, ...]] = ("name", "reference", "chat_template")
    name: str = Field(description="an embedded default (smollm2-135m-instruct), a local folder, or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    reference: str | None = Field(
        None, description="π_0, where it is not the model that training starts from; of the same tokens"
    )
    reference_revision: str | None = Field(None, description="its branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; only if you trust it")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: autocast with fp32 master weights and reductions; fp32: everything"
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


class DataConfig(Settings):
    PATHS: ClassVar[tuple[str, ...]] = ("train", "eval")
    train: str = Field(description="a .jsonl[.gz], .json or .parquet file, a data set's name, or builtin:quickstart")
    eval: str | None = Field(
        None,
        description="held-out prompts, likewise; where a system on a fixed set has no reward, held-out pairs or "
        "demonstrations; none: no before/after evaluation",
    )
    split: str = Field("train", description="split of a data set taken by name")
    eval_split: str = Field("test", description="the same of the held-out prompts")
    subset: str | None = Field(None, description="configuration of a data set taken by name")
    format: Literal["auto", "prompt", "completion", "messages", "preference", "hh"] = Field(
        "auto", description="auto: by the columns"
    )
    prompt_column: str = Field("prompt", description="the column that holds the prompt")
    chat: bool = Field(False, description="plain-text prompts are a user's message, put in the model's chat template")
    system_prompt: str | None = Field(None, description="put before every conversation that has none")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="longer prompts are left out and counted; none: an error"
    )
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="a row that is not of the data's format stops the run, or is left out and counted"
    )
    shuffle: bool = Field(True, description="a new order in every epoch, by the run's seed; false: the file's")


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
    compile: bool = Field(True, description="on a GPU, compile the layers of models that share prompts")
    optimizer: Literal["adafactor", "adamw"] = Field(
        "adafactor", description="Adafactor without momentum or relative steps (papers), or AdamW"
    )
    lr: float = Field(1e-6, gt=0, description="learning rate")
    critic_lr: float | None = Field(None, gt=0, description="of the value model; default: lr")
    warmup: int = Field(15, ge=0, description="updates of linear warm-up; then the rate is constant (papers)")
    decay: float = Field(0.0, ge=0, le=1, description="share of the updates, the last, in which it falls linearly to 0")
    weight_decay: float = Field(0.0, ge=0, description="decoupled, times the learning rate")
    max_grad_norm: float = Field(1.0, gt=0, description="a larger gradient is scaled down to it")
    no_signal: Literal["train", "skip"] = Field(
        "train",
        description="a batch whose rewards tell no completion from another: make the system's step all the same (of DAR: "
        "SFT on its own samples, pulled to π_0), or leave it out",
    )
    max_absent: float = Field(
        0.2, ge=0, le=1, description="stop when a larger share of a batch or an evaluation has no label"
    )


class EvalConfig(Settings):
    prompts: int = Field(64, ge=1, description="held-out prompts, at most")
    k: int = Field(1, ge=1, description="completions per held-out prompt")
    every: int = Field(0, ge=0, description="evaluate each so many online batches; 0: only before and after")
    temperature: float | None = Field(None, ge=0, description="default: the rollouts'")


class RunConfig(Settings):
    PATHS: ClassVar[tuple[str, ...]] = ("dir",)
    dir: str = Field("runs/run", description="the run's folder")
    seed: int = Field(0, ge=0, lt=2**32, description="of sampling, shuffling and dropout")
    checkpoints: int = Field(
        10, ge=1, description="how many over the run, at equal distances; the last batch always has one"
    )
    keep_last: int | None = Field(None, ge=1, description="how many checkpoints to keep; none: all")
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default_factory=list,
        description="where numbers are sent beside metrics.jsonl; TensorBoard's are in RUN/trackers",
    )
    project: str = Field("dualign", description="the trackers' name for it")


class Sections(Settings):
    """All but the algorithm (config.py adds it, and with it torch)."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: list[RewardConfig] = Field(default_factory=list)
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()
