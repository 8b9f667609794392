"""Settings of rewards that ask a server: a judge by a rubric, alone or in pairs, or a served reward model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dualign.annotate.serve import Serve, folder_of
from dualign.annotate.settings import RewardSettings
from dualign.common.digests import Digests, of_file
from dualign.common.settings import VariableName

if TYPE_CHECKING:
    from dualign.annotate.base import Annotator

PROMPT = 600  # tokens that a judge reads, assumed where nothing is sampled yet
SPENT = "spent.sqlite"  # a run's account of what it bought


class Endpoint(RewardSettings):
    """A server, how hard it may be asked, and what it may cost."""

    PATHS: ClassVar[tuple[str, ...]] = ("model", "cache")
    ASKING: ClassVar[frozenset[str]] = frozenset(
        {"api_key_env", "base_url", "cache", "concurrency", "max_calls", "max_dollars", "max_tokens_total", "serve"}
        | {"price_completion", "price_prompt", "requests_per_minute", "retries", "timeout", "tokens_per_minute"}
    )
    SERVED_BY: ClassVar[tuple[str, ...]] = ()  # options of a vLLM server that is started for it
    base_url: str = Field("", description="http://HOST:PORT/v1 of a server that runs, unless `serve` starts one")
    model: str = Field("", description="its name on the server; with `serve` by default its folder's or hub name")
    serve: Serve | None = Field(
        None, description="a model that is served for the run, by a server that ends with it: MODEL, or a section"
    )
    api_key_env: VariableName = Field("OPENAI_API_KEY", description="environment variable with the key; may be unset")
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

    @model_validator(mode="before")
    @classmethod
    def _named_as_served(cls, tree: Any) -> Any:
        """`serve: MODEL` is short for a section, and the model's name is the served one's, unless it is given."""
        served = tree.get("serve") if isinstance(tree, dict) else None
        if not isinstance(served, dict | str):
            return tree
        whole = {"model": served} if isinstance(served, str) else served
        return {**tree, "serve": whole, "model": tree.get("model") or whole.get("model", "")}

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if self.serve and self.base_url:
            raise ValueError("base_url (a server that runs) or serve (a model to be served), and not both")
        if not self.serve and not (self.base_url and self.model):
            raise ValueError("needs base_url and model (a server that runs), or serve (a model to be served)")
        if self.serve and self.serve.by == "transformers":
            if self.model != self.serve.model:
                raise ValueError("leave model out: `transformers serve` knows a model by its own name alone")
            if self.SERVED_BY:
                raise ValueError("a reward model is served by vllm; `type: classifier` runs one in process")
        return self

    @field_validator("base_url")
    @classmethod
    def _holds_no_secret(cls, url: str) -> str:
        if re.search(r"//[^/]*@|[?&][^=&]*(key|token|secret|password)[^=&]*=", url, re.IGNORECASE):
            raise ValueError("holds a password or key; put it into the environment variable that api_key_env names")
        return url

    def check(self) -> None:
        """Nothing is asked of a server before the run is."""
        if self.serve:
            self.serve.check()

    @property
    def gpu_share(self) -> float:
        """Of the memory of the GPU that trains, what its server takes."""
        return self.serve.gpu_memory if self.serve and self.serve.by == "vllm" and self.serve.beside else 0.0

    def made_of(self) -> dict[str, Digests]:
        """Of a model in a folder that is served under no name of its own: its files."""
        made = super().made_of()
        if self.serve is None or self.model != self.serve.model or folder_of(self.serve) is None:
            return made
        from dualign.models.digests import of_model

        return made | {"model": of_model(self.serve.model)}

    def dollars(self, labels: int) -> float:
        """Replies at their ceiling."""
        calls, reply_tokens = self._asked(labels)
        return calls * (PROMPT * self.price_prompt + reply_tokens * self.price_completion) / 1e6

    def describe(self, labels: int) -> str:
        dollars = self.dollars(labels)
        about = f"about {dollars:.2f} dollars for {self._asked(labels)[0]} calls (assuming {PROMPT} prompt tokens each)"
        served = f", {self.serve.describe()}" if self.serve else ""
        return super().describe(labels) + served + (f", at most {about}" if dollars else "")

    def _asked(self, labels: int) -> tuple[int, int]:
        """Calls, and the longest reply's tokens."""
        return labels, 0


class ServedReward(Endpoint):
    """A reward model behind vLLM's classification or pooling endpoint."""

    SERVED_BY: ClassVar[tuple[str, ...]] = ("--runner", "pooling")
    type: str = "served"
    route: Literal["classify", "pooling"] = Field("classify", description="the server's endpoint")

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.served import ServedAnnotator

        return ServedAnnotator(self, ledger=run_dir and run_dir / SPENT)


class JudgeSampling(Endpoint):
    temperature: float = Field(0.0, ge=0, description="of the judge's replies")
    max_tokens: int = Field(256, ge=1, description="of one reply")
    samples: int = Field(1, ge=1, description="replies per completion, averaged (needs temperature > 0 to differ)")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="for the judge's chat template: {enable_thinking: false} with Qwen3"
    )

    @model_validator(mode="after")
    def _samples_differ(self) -> JudgeSampling:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("samples > 1 at temperature 0 would buy the same reply again: set temperature above 0")
        return self

    def decides(self) -> dict[str, Any]:
        empty = set() if self.chat_template_kwargs else {"chat_template_kwargs"}  # as runs of before had it
        return {key: value for key, value in super().decides().items() if key not in empty}

    def _asked(self, labels: int) -> tuple[int, int]:
        return labels * self.samples, self.max_tokens


class RubricReward(JudgeSampling):
    """A judge that is asked by a rubric."""

    PATHS: ClassVar[tuple[str, ...]] = (*Endpoint.PATHS, "rubric")
    rubric: str = Field(description="summarization, helpfulness, harmlessness, or a YAML file")

    def check(self) -> None:
        from dualign.annotate.rubric import load

        super().check()
        load(self.rubric)

    def made_of(self) -> dict[str, Digests]:
        from dualign.annotate.rubric import file_of

        return super().made_of() | {"rubric": of_file(file_of(self.rubric))}


class JudgeReward(RubricReward):
    """AI reward: an LLM judge's 1-10 score of one completion."""

    type: str = "judge"
    expected_score: bool = Field(False, description="expectation over the score's token log-probs, where served")

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.judge import JudgeAnnotator

        return JudgeAnnotator(self, ledger=run_dir and run_dir / SPENT)


class PreferenceReward(RubricReward):
    """AI preference: which of two completions is better, asked in both orders. A completion's value is 1 where it
    won, 0 where it lost, 0.5 for a tie; with K > 2 the K completions of a prompt meet as neighbours (1-2, 3-4, ...)."""

    compares: ClassVar[bool] = True
    type: str = "preference"

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.preference import PreferenceAnnotator

        return PreferenceAnnotator(self, ledger=run_dir and run_dir / SPENT)
