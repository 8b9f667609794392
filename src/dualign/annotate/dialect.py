"""How one server wants a chat request spelled: learned from its own refusals, once per address and model.

Servers that speak OpenAI's HTTP differ in what they take. One refuses `max_tokens` and wants `max_completion_tokens`,
another has no `temperature`, a third knows no schemas. A request says what it *wants*; each want has a ladder of
spellings, the usual one first. A refusal that names a field climbs one rung of the ladder that sent it, and the same
request is sent again. Rungs are only climbed, so this ends; what no rung helps is the request's own fault.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]
Thinking = Literal["off", "on"]
REFUSES = re.compile(
    r"support|unrecogni[sz]ed|unknown|unexpected|not (?:permitted|allowed|enabled|available|a valid)|unavailable|extra|invalid|"
    r"deprecated|removed|no longer|must be|only|cannot|can't|less than|at most",
    re.I,
)


NOWHERE = float("inf")
THINKING = {"reasoning_effort", "reasoning", "thinking", "enable_thinking", "chat_template_kwargs"}
THINKS = (
    r"\w*thinking\w*|reasoning\w*|chat_template_kwargs|budget"  # "Budget 0 is invalid. This model only works in ..."
)


@dataclass(frozen=True)
class Rung:
    """One spelling of a want. `lost`: for people, what is given up from here on; None: nothing is."""

    fields: Callable[[Any], Fields]
    lost: str | None = None


def _as(*names: str) -> Callable[[Any], Fields]:
    return lambda value: dict.fromkeys(names, value)


def _nothing(value: Any) -> Fields:
    return {}


def _schema(limited: bool) -> Callable[[Any], Fields]:
    """A JSON schema as OpenAI's `response_format`. Strict servers refuse a longest length: their second rung."""

    def fields(schema: Mapping[str, Any]) -> Fields:
        tree = schema if limited else _without(schema, "maxLength")
        return {"response_format": {"type": "json_schema",
                                    "json_schema": {"name": "verdict", "strict": True, "schema": tree}}}  # fmt: skip

    return fields


LADDERS: dict[str, Sequence[Rung]] = {
    "max_tokens": (Rung(_as("max_tokens")), Rung(_as("max_completion_tokens"))),
    "temperature": (Rung(_as("temperature")), Rung(_nothing, "takes no temperature: its own default decides")),
    "top_logprobs": (
        Rung(lambda n: {"logprobs": True, "top_logprobs": n}),
        Rung(lambda n: {"logprobs": True, "top_logprobs": min(n, 5)}),
        Rung(_nothing, "gives no log-probs: scores are taken as they are written"),
    ),
    "stop": (Rung(_as("stop")), Rung(_nothing, "takes no stop strings")),
    "schema": (
        Rung(_schema(limited=True)),
        Rung(_schema(limited=False)),
        Rung(
            lambda schema: {"response_format": {"type": "json_object"}}, "takes no schema: JSON is asked for in words"
        ),
        Rung(_nothing, "takes no response_format: JSON is asked for in words"),
    ),
    "choice": (
        Rung(lambda choices: {"structured_outputs": {"choice": choices}}),
        Rung(_as("guided_choice")),  # vLLM before 0.12
        Rung(_nothing, "has no guided choice: replies are read as text"),
    ),
}


def _kwargs(on: bool) -> Rung:
    # the chat templates of Qwen3 and GLM read the first, those of DeepSeek and Granite the second
    return Rung(lambda _: {"chat_template_kwargs": {"enable_thinking": on, "thinking": on}})


def _effort(effort: str) -> Rung:
    return Rung(lambda _: {"reasoning_effort": effort})


def _typed(kind: str) -> Rung:
    return Rung(lambda _: {"thinking": {"type": kind}})


EFFORTS = {"off": (_effort("none"), _effort("minimal"), _effort("low")), "on": (_effort("medium"), _effort("high"))}
TYPES = {"off": (_typed("disabled"),), "on": (_typed("enabled"), _typed("adaptive"))}
STUCK = Rung(_nothing, "cannot be told whether to think: it does as it does, and what it thinks is paid for")


def _thinking(host: str, word: Thinking) -> Sequence[Rung]:
    """How a host is told to think or not: first its own way, then the others. Hosts that are not known are taken for
    servers of open models (vLLM, SGLang), whose chat templates decide."""
    on = word == "on"
    efforts, types = EFFORTS[word], TYPES[word]
    if re.search(
        r"(^|\.)(openai\.com|openai\.azure\.com|services\.ai\.azure\.com|googleapis\.com|x\.ai|groq\.com)$", host
    ):
        return (*efforts, STUCK)
    if re.search(r"(^|\.)(anthropic\.com|deepseek\.com|bigmodel\.cn|z\.ai|moonshot\.(ai|cn)|volces\.com)$", host):
        return (*types, *efforts, STUCK)
    if host.endswith("openrouter.ai"):
        return (Rung(lambda _: {"reasoning": {"enabled": on}}), *efforts, STUCK)
    if re.search(r"(^|\.)(aliyuncs\.com|siliconflow\.(com|cn))$", host):
        return (Rung(lambda _: {"enable_thinking": on}), *efforts, STUCK)
    return (_kwargs(on), *efforts, *types, STUCK)


@dataclass
class Dialect:
    """What is known of one model at one address. Safe to share between threads."""

    url: str
    model: str
    known: bool = False  # whether it has ever taken a request
    thinks: bool = False  # whether a reply was cut off while it was thinking
    rungs: dict[str, int] = field(default_factory=dict)  # by want
    lock: threading.Lock = field(default_factory=threading.Lock)
    told: set[str] = field(default_factory=set)

    def ladder(self, want: str, value: Any) -> Sequence[Rung]:
        if want == "thinking":
            return _thinking(urlsplit(self.url).hostname or "", value)
        return LADDERS[want]

    def spelled(self, wants: Mapping[str, Any]) -> Spelled:
        """The fields of a request with these wants, as far as is known now."""
        with self.lock:
            at = {want: self.rungs.get(_key(want, value), 0) for want, value in wants.items()}
        return Spelled({want: self.ladder(want, value)[at[want]].fields(value) for want, value in wants.items()}, at)

    def learn(self, wants: Mapping[str, Any], spelled: Spelled, refusal: str, param: str | None) -> bool:
        """Whether a refusal taught something, so that the request is worth sending again. `param`: the field that the
        server names as such; else its words are searched."""
        named = {want: min((_place(name, refusal, param) for name in fields), default=NOWHERE)
                 for want, fields in spelled.fields.items()}  # fmt: skip
        for want in sorted(named, key=lambda want: named[want]):  # the field that is named first is the one refused
            if named[want] == NOWHERE or (want == "max_tokens" and not _is_unknown(refusal)):
                continue
            key, ladder = _key(want, wants[want]), self.ladder(want, wants[want])
            with self.lock:
                if self.rungs.get(key, 0) > spelled.at[want]:
                    return True  # learned since this one was sent
                if spelled.at[want] + 1 == len(ladder):
                    continue
                self.rungs[key] = spelled.at[want] + 1
            if lost := ladder[spelled.at[want] + 1].lost:
                self.say(lost)
            return True
        return False

    def say(self, words: str) -> None:
        """To people, once."""
        with self.lock:
            if words in self.told:
                return
            self.told.add(words)
        log.warning("note: %s at %s %s", self.model, self.url, words)


@dataclass(frozen=True)
class Spelled:
    """The fields of one request, by the want that they stand for, and the rung of each."""

    fields: Mapping[str, Fields]
    at: Mapping[str, int]

    def onto(self, body: Fields) -> dict[str, Any]:
        """The request's whole body. Mappings that both have are joined; what the body says itself stands."""
        whole: dict[str, Any] = {}
        for fields in (*self.fields.values(), body):
            for name, value in fields.items():
                both = isinstance(value, Mapping) and isinstance(whole.get(name), Mapping)
                whole[name] = {**whole[name], **value} if both else value
        return whole


_dialects: dict[tuple[str, str], Dialect] = {}
_lock = threading.Lock()


def of(url: str, model: str) -> Dialect:
    """The process's one dialect of a model at an address."""
    with _lock:
        key = (url.rstrip("/"), model)
        return _dialects.setdefault(key, Dialect(*key))


def _key(want: str, value: Any) -> str:
    return f"{want} {value}" if want == "thinking" else want


def _place(name: str, refusal: str, param: str | None) -> float:
    """Where a refusal names the field `name`; NOWHERE where it is not about it."""
    if param:
        known = re.match(rf"{name}(?:\W|$)", param) or (name == "reasoning_effort" and param.endswith(".effort"))
        return 0 if known else NOWHERE
    words = THINKS if name in THINKING else re.escape(name)
    found = re.search(rf"(?i)(?<![\w.-])(?:{words})(?![\w-])", refusal)
    return found.start() if found and REFUSES.search(refusal) else NOWHERE


def _is_unknown(refusal: str) -> bool:
    """Whether a field is not taken at all, or another is wanted for it: not its value alone is wrong."""
    return bool(re.search(r"max_completion_tokens|unsupported|not supported|unrecogni[sz]ed|unknown|unexpected|"
                          r"not permitted|extra", refusal, re.I))  # fmt: skip


def _without(tree: Any, key: str) -> Any:
    if isinstance(tree, Mapping):
        return {k: _without(v, key) for k, v in tree.items() if k != key}
    return [_without(v, key) for v in tree] if isinstance(tree, list) else tree
