"""Settings of rewards that ask a server: a judge by a rubric, alone or in pairs, or a served reward model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, field_validator, model_validator

from dualign.annotate.designs import all_pairs, default_rounds, tournament_pairs
from dualign.annotate.dialect import THINKING
from dualign.annotate.forms import Form, Question
from dualign.annotate.serve import Serve, folder_of
from dualign.annotate.settings import RewardSettings
from dualign.common.digests import Digests, of_file
from dualign.common.errors import UserError
from dualign.common.settings import VariableName, fault_at

if TYPE_CHECKING:
    from dualign.annotate.base import Annotator

PROMPT = 600  # tokens that a judge reads, assumed where nothing is sampled yet
REPLY, ROOM = 256, 4096  # tokens of a reply, and of one that is thought over first
NEW: dict[str, Any] = {  # settings that runs of before have not, and what stands for that
    "thinking": None, "stop": [], "extra_body": {}, "chat_template_kwargs": {}, "reply": "text", "rubric_column": None,
}  # fmt: skip
OWN_FIELDS = {  # of a request; each with the setting that it is
    **dict.fromkeys(("temperature", "stop", "samples", "model"), "a setting of its own, beside extra_body"),
    **dict.fromkeys(("max_tokens", "max_completion_tokens"), "set max_tokens beside extra_body: ceilings go by it"),
    **dict.fromkeys(("logprobs", "top_logprobs"), "set expected_score"),
    **dict.fromkeys(("response_format", "structured_outputs", "guided_choice", "guided_json"), "set reply: json or choice"),
    **dict.fromkeys(("n", "best_of"), "set samples"), "messages": "what is asked is the rubric's",
    "stream": "replies are read in one piece",
}  # fmt: skip
RESPONSE = 150  # of each response beyond two
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
        return calls * (self._prompt_tokens() * self.price_prompt + reply_tokens * self.price_completion) / 1e6

    def describe(self, labels: int) -> str:
        dollars, tokens = self.dollars(labels), self._prompt_tokens()
        about = f"about {dollars:.2f} dollars for {self._asked(labels)[0]} calls (assuming {tokens} prompt tokens each)"
        served = f", {self.serve.describe()}" if self.serve else ""
        return super().describe(labels) + served + (f", at most {about}" if dollars else "")

    def _asked(self, labels: int) -> tuple[int, int]:
        """Calls, and the longest reply's tokens."""
        return labels, 0

    def _prompt_tokens(self) -> int:
        """Of one call, about."""
        return PROMPT


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
    max_tokens: int | None = Field(
        None, ge=1, description="of one reply, thinking included; default: 256, and 4096 for a judge that thinks"
    )
    samples: int = Field(1, ge=1, description="replies per completion, averaged (needs temperature > 0 to differ)")
    thinking: Literal["off", "on"] | None = Field(
        None, description="whether the judge thinks before it answers; default: as its server has it"
    )
    stop: list[str] = Field(default_factory=list, description="texts that end a reply")
    extra_body: dict[str, Any] = Field(
        default_factory=dict, description="anything else that the server takes: {reasoning_effort: low, top_k: 20}"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="for the judge's chat template, which `thinking` fills for most models"
    )

    @field_validator("thinking", mode="before")
    @classmethod
    def _yaml_words(cls, value: Any) -> Any:
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value  # YAML's off and on

    @field_validator("extra_body")
    @classmethod
    def _of_its_own(cls, body: dict[str, Any]) -> dict[str, Any]:
        for name in body.keys() & OWN_FIELDS.keys():
            raise ValueError(f"{name}: {OWN_FIELDS[name]}")
        if not isinstance(body.get("chat_template_kwargs", {}), dict):
            raise ValueError("chat_template_kwargs: expected a mapping")
        return body

    @field_validator("extra_body", "chat_template_kwargs")
    @classmethod
    def _is_json(cls, body: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(body, allow_nan=False, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(f"it is sent as JSON, which has no such thing: {error}") from None
        return body

    @model_validator(mode="after")
    def _samples_differ(self) -> JudgeSampling:
        if self._repeats():
            raise ValueError("samples > 1 at temperature 0 would buy the same reply again: set temperature above 0")
        return self

    @model_validator(mode="after")
    def _thinks_one_way(self) -> JudgeSampling:
        if self.thinking and (twice := THINKING & self.extra_body.keys()):
            raise ValueError(f"thinking and extra_body.{min(twice)} say the same: set one of them")
        return self

    @property
    def reply_tokens(self) -> int:
        """The most tokens of a reply that is asked for."""
        return self.max_tokens or (ROOM if self.thinking == "on" else REPLY)

    def _repeats(self) -> bool:
        """Whether one request would be sent several times, to the same reply."""
        return self.samples > 1 and self.temperature == 0

    def decides(self) -> dict[str, Any]:
        """As runs of before had it, where nothing new is set."""
        told = {key: value for key, value in super().decides().items() if key not in NEW or value != NEW[key]}
        return told | {"max_tokens": self.reply_tokens}

    def _asked(self, labels: int) -> tuple[int, int]:
        return labels * self.samples, self.reply_tokens


class RubricReward(JudgeSampling):
    """A judge that is asked by a rubric."""

    PATHS: ClassVar[tuple[str, ...]] = (*Endpoint.PATHS, "rubric")
    rubric: str = Field(description="summarization, helpfulness, harmlessness, or a YAML file")
    reply: Form = Field(
        "text", description="in what form the judge replies; json and choice: held to it by servers that can"
    )

    def check(self) -> None:
        from dualign.annotate.judge import wants_of
        from dualign.annotate.rubric import load

        super().check()
        kind = "ranking" if getattr(self, "pairs", "") == "ranking" else self.type
        rubric = load(self.rubric, kind == "ranking").check(kind)
        questions: dict[str, Question] = {"preference": "pair", "ranking": "ranking"}
        wants_of(questions.get(kind, "criterion" if rubric.checklist else "score"), self.reply, rubric)

    def made_of(self) -> dict[str, Digests]:
        from dualign.annotate.rubric import digest_without_ranking

        return super().made_of() | {"rubric": digest_without_ranking(self.rubric)}


class JudgeReward(RubricReward):
    """AI reward: an LLM judge's 1-10 score of one completion."""

    type: str = "judge"
    rubric_column: str | None = Field(
        None, description="the data's column with a row's own rubric: its name, file or keys; empty: `rubric`"
    )
    expected_score: bool = Field(False, description="expectation over the score's token log-probs, where served")

    def _asked(self, labels: int) -> tuple[int, int]:
        """A checklist asks once for each criterion; of the rows' own nobody knows how many."""
        from dualign.annotate.rubric import load

        calls, tokens = super()._asked(labels)
        try:
            checklist = load(self.rubric).checklist
        except UserError:  # `check` says so
            checklist = None
        return calls * max(1, len(checklist.criteria) if checklist else 1), tokens

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.judge import JudgeAnnotator

        return JudgeAnnotator(self, ledger=run_dir and run_dir / SPENT)


class PreferenceReward(RubricReward):
    """AI preference: an LLM judge compares the K completions of a prompt, pairs of them in both orders or all of them
    at once. With `pairs: neighbours` (1-2, 3-4, ...) a completion's value is 1 where it won, 0 where it lost, 0.5 for a
    tie."""

    compares: ClassVar[bool] = True
    type: str = "preference"
    pairs: Literal["neighbours", "all", "tournament", "ranking"] = Field(
        "neighbours",
        description="which of a prompt's completions meet: 1-2, 3-4, ...; every two; those of like strength, in rounds; "
        "or all in one request that asks for their order",
    )
    rounds: int | None = Field(None, ge=1, description="of a tournament; default: ⌈log2 K⌉")
    score: Literal["wins", "bradley_terry"] = Field(
        "wins", description="share of comparisons won, a tie half; or Bradley-Terry strengths, of mean zero per prompt"
    )
    samples: int = Field(
        1,
        ge=1,
        description="replies for each order of a pair, of which the majority counts (needs temperature > 0 to differ); "
        "orders in which a ranking shows the completions, every second one the reverse of that before",
    )
    _k: int = PrivateAttr(2)  # completions per prompt, for the price

    @model_validator(mode="after")
    def _fits_its_pairs(self) -> PreferenceReward:
        if self.rounds is not None and self.pairs != "tournament":
            raise fault_at("rounds", self.rounds, ValueError("only pairs: tournament has rounds"))
        if self.score != "wins" and self.pairs == "neighbours":
            fault = ValueError(
                "neighbours meet once: their strengths say no more than wins; set pairs: all, for instance"
            )
            raise fault_at("score", self.score, fault)
        return self

    def _repeats(self) -> bool:
        return super()._repeats() and self.pairs != "ranking"  # each sample of it is another order

    def made_of(self) -> dict[str, Digests]:
        from dualign.annotate.rubric import file_of

        ranking = {"rubric": of_file(file_of(self.rubric))} if self.pairs == "ranking" else {}
        return super().made_of() | ranking

    def decides(self) -> dict[str, Any]:
        plain = {"pairs": "neighbours", "rounds": None, "score": "wins"}.items()  # as runs of before had it
        return {key: value for key, value in super().decides().items() if (key, value) not in plain}

    def of_groups(self, k: int) -> PreferenceReward:
        copy = self.model_copy()
        copy._k = k
        return copy

    def describe(self, labels: int) -> str:
        told = super().describe(labels)
        if self.pairs == "neighbours":
            return told
        calls = "" if self.dollars(labels) else f", at most {self._asked(labels)[0]} calls"
        return f"{told}{calls}, pairs: {self.pairs} (K = {self._k})"

    def _asked(self, labels: int) -> tuple[int, int]:
        k, (calls, reply_tokens) = self._k, super()._asked(labels)
        groups = math.ceil(labels / k)
        if self.pairs == "ranking":
            calls = groups * self.samples * (k > 1)
        elif self.pairs != "neighbours":
            every = self.pairs == "all"
            met = len(all_pairs(k)) if every else tournament_pairs(k, self.rounds or default_rounds(k))
            calls = groups * met * 2 * self.samples  # both orders
        return calls, reply_tokens

    def _prompt_tokens(self) -> int:
        return PROMPT + (RESPONSE * max(0, self._k - 2) if self.pairs == "ranking" else 0)

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.preference import PreferenceAnnotator

        return PreferenceAnnotator(self, ledger=run_dir and run_dir / SPENT)
