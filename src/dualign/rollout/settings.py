"""The section `rollout` of a run's configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, SerializeAsAny, ValidationInfo, field_validator, model_validator

from dualign.common.child import vllm_place, vllm_python
from dualign.common.errors import UserError
from dualign.common.named import class_of
from dualign.common.settings import Settings, VariableName

if TYPE_CHECKING:
    from dualign.models.policy import Policy
    from dualign.models.tokenizer import Tokenizer
    from dualign.rollout.base import Sampler


class SamplerSettings(Settings):
    """What an engine is set up with. One of your own is a subclass with fields and `build`."""

    ASKING: ClassVar[frozenset[str]] = frozenset()  # settings that decide no completion: a resume may change them
    rounds: ClassVar[bool] = False  # in another way than the policy: its log-probs cannot be recorded as log π_t

    def describe(self) -> str:
        """What samples, for --dry-run; empty: nothing worth saying."""
        return ""

    def check(self) -> None:
        """For --dry-run: raises UserError for what is wrong, without a model."""

    def build(self, policy: Policy, tokenizer: Tokenizer, recorded: bool) -> Sampler:
        """A sampler for `policy`, whose weights are still as they were loaded. `recorded`: whether its log-probs are to
        be log π_t (rollout.log_probs)."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


class HFSettings(SamplerSettings):
    ASKING: ClassVar[frozenset[str]] = frozenset({"decode_batch_size", "cuda_graphs"})
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


class VLLMSettings(SamplerSettings):
    """Servers that somebody started (`url`), or one of the run's own (`serve`)."""

    PATHS: ClassVar[tuple[str, ...]] = ("python", "weights_dir")
    ASKING: ClassVar[frozenset[str]] = frozenset(
        {
            "url",
            "serve",
            "python",
            "weights_dir",
            "api_key_env",
            "gpu_memory",
            "max_model_len",
            "tensor_parallel",
            "args",
        }
        | {"concurrency", "timeout"}
    )
    rounds: ClassVar[bool] = True

    url: str | list[str] | None = Field(
        None, description="servers that you started, dealt over the processes; each with VLLM_SERVER_DEV_MODE=1"
    )
    serve: bool = Field(False, description="start a server on each machine of the run, and end it with the run")
    python: str | None = Field(
        None, description="the interpreter that has vllm, for `serve`; default: that of `dualign vllm-setup`"
    )
    weights_dir: str | None = Field(
        None,
        description="folder that the run writes weights into and servers read them from; default: in the user's cache "
        "folder. Servers on other machines need one that all share",
    )
    api_key_env: VariableName = Field(
        "VLLM_API_KEY", description="environment variable that holds the servers' key, if they want one"
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="of the served weights, for `serve`; auto: what the policy computes in"
    )
    gpu_memory: float = Field(
        0.4, gt=0, lt=1, description="share of each GPU's memory that `serve` takes; on a CPU of the machine's"
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="tokens of a prompt and its completion, for `serve`; default: 8192, or what the model sees",
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs that `serve` divides the model over")
    args: list[str] = Field(
        default_factory=list, description="more of the command line that `serve` starts vLLM by, as [--enforce-eager]"
    )
    concurrency: int = Field(256, ge=1, description="completions that a process has a server draw at once")
    timeout: float = Field(
        600.0,
        gt=0,
        description="seconds after which a server counts as hung: none of its completions ended, or it did not start or "
        "take weights",
    )

    @property
    def urls(self) -> list[str]:
        return [self.url] if isinstance(self.url, str) else list(self.url or ())

    @property
    def interpreter(self) -> Path:
        return vllm_place(self.python)

    @field_validator("url")
    @classmethod
    def _are_urls(cls, url: str | list[str] | None) -> str | list[str] | None:
        for each in [url] if isinstance(url, str) else url or ():
            if not re.match(r"https?://[^/@]+", each):
                raise ValueError(f"{each!r} is not a URL such as http://localhost:8000")
            if re.search(r"//[^/]*@|[?&]", each):
                raise ValueError("holds a password or more than an address; a key goes into VLLM_API_KEY")
        return url

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if bool(self.urls) == self.serve:
            raise ValueError("engine vllm needs url (servers that you started) or serve: true, and not both")
        return self

    def describe(self) -> str:
        if self.serve:
            return f"vLLM, a server of the run's own by {self.interpreter}, {self.gpu_memory:.0%} of a GPU"
        return f"vLLM at {', '.join(self.urls)}"

    def check(self) -> None:
        if self.serve:
            vllm_python(self.python, "rollout.options.python")
        far = [url for url in self.urls if urlsplit(url).hostname not in ("localhost", "127.0.0.1", "::1")]
        if far and self.weights_dir is None:
            raise UserError(
                f"rollout.options.weights_dir: {far[0]} is on another machine; name a folder that both it and the run see"
            )

    def build(self, policy: Policy, tokenizer: Tokenizer, recorded: bool) -> Sampler:
        from dualign.rollout.vllm.sampler import VLLMSampler

        self.check()
        return VLLMSampler(self, policy, tokenizer)


ENGINES: dict[str, type[SamplerSettings]] = {"hf": HFSettings, "vllm": VLLMSettings}


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
    engine: str = Field("hf", description="what samples: hf (transformers), vllm, or one of your own: FILE.py:NAME")
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
    ahead: int = Field(
        0,
        ge=0,
        le=8,
        description="batches that are sampled before their turn, so that their labels come while earlier ones are trained "
        "on; each is as many batches older than the policy that trains on it",
    )
    resample: int = Field(
        0,
        ge=0,
        description="further prompts that a batch may take, at most: one for each whose completions all got one label, "
        "from which nothing is learned (DAPO's dynamic sampling, within a budget)",
    )
    importance_cap: float | None = Field(
        None,
        ge=1,
        description="weight each completion's loss by min(π_t/π_sampler, this), π_t being recomputed; none: not at all",
    )

    @field_validator("engine")
    @classmethod
    def _is_known(cls, engine: str) -> str:
        class_of(engine, ENGINES, SamplerSettings)
        return engine

    @field_validator("options", mode="before")
    @classmethod
    def _of_engine(cls, options: Any, info: ValidationInfo) -> Any:
        if "engine" not in info.data:  # a fault of its own, and whose options these are is not known
            return SamplerSettings()
        if isinstance(options, SamplerSettings):
            return options
        return class_of(info.data["engine"], ENGINES, SamplerSettings).model_validate(options)

    @field_validator("log_probs")
    @classmethod
    def _are_exact(cls, log_probs: str, info: ValidationInfo) -> str:
        if log_probs == "recorded" and getattr(info.data.get("options"), "rounds", False):
            engine = info.data.get("engine")
            raise ValueError(f"{engine} rounds in another way than the policy; set rollout.log_probs=recomputed")
        return log_probs
