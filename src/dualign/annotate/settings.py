"""How rewards are configured: one strict model per kind of annotator, told apart by `type`. No torch here."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from dualign.common.settings import Settings


class RewardSettings(Settings):
    """What every reward has."""

    name: str | None = Field(None, description="its name in logs and Parquet; default: from the function or model")
    weight: float = Field(1.0, description="its factor in the sum of rewards")
    clip: list[float] | None = Field(
        None,
        description="[low, high]: its value is held within these before it is weighted",
        min_length=2,
        max_length=2,
    )
    where: dict[str, str | int | bool] = Field(
        default_factory=dict,
        description="only rows whose data columns have these values; the other rewards decide the rest",
    )
    optional: bool = Field(
        False,
        description="None means 'does not apply to this row': the other rewards decide. Otherwise a row that one "
        "reward could not label is absent",
    )

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: list[float] | None) -> list[float] | None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"[low, high] with low < high, not {clip}")
        return clip


class FunctionReward(RewardSettings):
    """A Python function `(prompts, completions, **columns) -> list[float | None]`, plain or async."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)
    type: Literal["function"] = "function"
    path: str = Field(description="FILE.py:FUNCTION or package.module:FUNCTION")
    timeout: float | None = Field(None, gt=0, description="seconds; a late answer is absent")


class HeadReward(RewardSettings):
    """Frozen MiniLM features with a ridge Bradley-Terry head, made by `dualign reward fit`."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)
    type: Literal["head"] = "head"
    path: str = Field("builtin:harmless", description="a head file, or builtin:NAME")


class ClassifierReward(RewardSettings):
    """A Hugging Face sequence classifier with one output, in process."""

    PATHS: ClassVar[tuple[str, ...]] = ("model",)
    type: Literal["classifier"] = "classifier"
    model: str = Field(description="a local folder or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; only if you trust it")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of its weights")
    batch_size: int = Field(16, ge=1, description="completions of one forward pass")
    max_tokens: int = Field(4096, ge=8, description="longer inputs are absent, never cut silently")


class Endpoint(RewardSettings):
    """A server, how hard it may be asked, and what it may cost."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "cache")
    base_url: str = Field(description="http://HOST:PORT/v1")
    model: str = Field(description="its name on the server")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="environment variable that holds the key; may be unset for local servers"
    )
    concurrency: int = Field(64, ge=1, description="requests at once")
    requests_per_minute: int | None = Field(None, ge=1, description="a limit, evenly spread")
    tokens_per_minute: int | None = Field(None, ge=1, description="likewise")
    timeout: float = Field(60.0, gt=0, description="seconds for one attempt")
    retries: int = Field(6, ge=0, description="further attempts after a failure that may pass")
    price_prompt: float = Field(0.0, ge=0, description="dollars per million prompt tokens")
    price_completion: float = Field(0.0, ge=0, description="dollars per million completion tokens")
    max_dollars: float | None = Field(None, ge=0, description="ceiling for the run, what is in flight included")
    max_tokens_total: int | None = Field(None, ge=0, description="ceiling for the run")
    max_calls: int | None = Field(None, ge=0, description="ceiling for the run")
    cache: str | None = Field(None, description="SQLite file of labels; default: one in the user's cache folder")

    @field_validator("api_key_env")
    @classmethod
    def _names_a_variable(cls, name: str) -> str:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):  # a key itself must not get into copies of the configuration
            raise ValueError("expected the NAME of an environment variable in capitals, never the key itself")
        return name

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if re.search(r"//[^/]*@|[?&][^=&]*(key|token|secret|password)[^=&]*=", url, re.IGNORECASE):
            raise ValueError("holds a password or key; put it into the environment variable that api_key_env names")
        return url


class ServedReward(Endpoint):
    """A reward model behind vLLM's classification or pooling endpoint."""

    type: Literal["served"] = "served"
    route: Literal["classify", "pooling"] = Field("classify", description="the server's endpoint")


class JudgeSampling(Endpoint):
    temperature: float = Field(0.0, ge=0, description="of the judge's replies")
    max_tokens: int = Field(256, ge=1, description="of one reply")
    samples: int = Field(1, ge=1, description="replies per completion, averaged (needs temperature > 0 to differ)")

    @model_validator(mode="after")
    def _samples_differ(self) -> JudgeSampling:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples > 1 at temperature 0 would buy the same reply again: set temperature above 0")
        return self


class JudgeReward(JudgeSampling):
    """AI reward: an LLM judge's 1-10 score of one completion."""

    PATHS: ClassVar[tuple[str, ...]] = (*Endpoint.PATHS, "rubric")
    type: Literal["judge"] = "judge"
    rubric: str = Field(description="summarization, helpfulness, harmlessness, or a YAML file")
    expected_score: bool = Field(False, description="expectation over the score's token log-probs, where served")


class PreferenceReward(JudgeSampling):
    """AI preference: which of two completions is better, asked in both orders. A completion's value is 1 where it
    won, 0 where it lost, 0.5 for a tie; with K > 2 the K completions of a prompt meet as neighbours (1-2, 3-4, ...)."""

    PATHS: ClassVar[tuple[str, ...]] = (*Endpoint.PATHS, "rubric")
    type: Literal["preference"] = "preference"
    rubric: str = Field(description="summarization, helpfulness, harmlessness, or a YAML file")


RewardConfig = Annotated[
    FunctionReward | HeadReward | ClassifierReward | ServedReward | JudgeReward | PreferenceReward,
    Field(discriminator="type"),
]
