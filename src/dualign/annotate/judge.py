"""AI reward: an LLM judge's score of one completion, asked for while others are still being decoded."""

from __future__ import annotations

import math
import re
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from dualign.annotate import batch, extract
from dualign.annotate.base import Item
from dualign.annotate.client import Client, Payload, Request
from dualign.annotate.endpoints import JudgeReward, JudgeSampling
from dualign.annotate.reply import read_reply
from dualign.annotate.rubric import Rubric, load
from dualign.common.types import Label, Message, Prompt

Row = TypeVar("Row")
Asked = TypeVar("Asked")


class JudgeAnnotator:
    """A label is sign * score, averaged over the samples that gave one; its note is the judge's own words."""

    def __init__(self, settings: JudgeReward, *, ledger: Path | None = None) -> None:
        self.rubric = load(settings.rubric)
        self.name = settings.name or self.rubric.name
        self.settings = settings
        self.client = Client(settings, ledger=ledger)

    def open(self) -> JudgeSession:
        return JudgeSession(self)

    def close(self) -> None:
        self.client.close()

    def ask(self, item: Item) -> list[Future[Label]]:
        """Starts asking for one completion: a future per sample."""
        messages = self.rubric.reward_messages(item.prompt, item.completion)
        expected = self.settings.expected_score
        more = {"logprobs": True, "top_logprobs": 20} if expected else {}

        def read(payload: Payload) -> Label:
            return read_score(payload, self.rubric, item.completion, item.prompt, expected=expected)

        return [
            self.client.submit(chat(self.settings, messages, self.rubric.name, sample, more), read)
            for sample in range(self.settings.samples)
        ]

    def combine(self, asked: list[Future[Label]]) -> Label:
        """The mean of the samples' scores as one label. Raises what ended the run."""
        labels = [future.result() for future in asked]
        values = [label.value for label in labels if label.value is not None]
        note = "\n---\n".join(label.note for label in labels if label.note) or None
        if not values:
            return Label.absent(labels[0].reason or "absent", note=note, parts={self.name: None})
        value = math.fsum(values) / len(values)
        return Label(value, parts={self.name: value}, note=note)


class JudgeSession:
    def __init__(self, annotator: JudgeAnnotator) -> None:
        self._annotator = annotator
        self._asked: dict[int, list[Future[Label]]] = {}

    def add(self, item: Item) -> None:
        self._asked[item.index] = self._annotator.ask(item)

    def close(self) -> dict[int, Label]:
        return {index: self._annotator.combine(asked) for index, asked in self._asked.items()}


def windowed(rows: Iterable[Row], ask: Callable[[Row], Asked], window: int) -> Iterator[tuple[Row, Asked]]:
    """Each row with what was asked for it, in order, with at most `window` rows asked ahead of the one that is
    yielded: however long the file, memory stays flat. A batch wants all that is to be asked."""
    if batch.current() is not None:
        window = sys.maxsize
    ahead: deque[tuple[Row, Asked]] = deque()
    for row in rows:
        ahead.append((row, ask(row)))
        if len(ahead) > window:
            yield ahead.popleft()
    yield from ahead


def chat(
    settings: JudgeSampling,
    messages: list[Message],
    rubric: str,
    sample: int = 0,
    more: Mapping[str, Any] | None = None,
) -> Request:
    sampling = {"temperature": settings.temperature, "max_tokens": settings.max_tokens, **(more or {})}
    if settings.chat_template_kwargs:
        sampling["chat_template_kwargs"] = settings.chat_template_kwargs
    return Request("chat/completions", {"messages": messages, **sampling}, rubric, sample)


def read_score(
    payload: Payload, rubric: Rubric, completion: str, prompt: Prompt | None = None, *, expected: bool = False
) -> Label:
    text, cut, tokens = read_reply(payload)
    low, high = rubric.scale
    found = extract.score(text, low=low, high=high, cut=cut, echo=completion, echoes=prompt.texts if prompt else ())
    if found.value is None:
        return Label.absent(found.reason or "no score in the reply", note=text)
    mean = expected_score(tokens, found.value, low, high) if expected else None
    return Label(rubric.sign * (found.value if mean is None else mean), note=text)


def expected_score(tokens: list[Mapping[str, Any]], written: float, low: float, high: float) -> float | None:
    """Σ score · p(score) over the integers in low..high, at the token where the judge wrote its score; None where the
    server gave no log-probs, where the number stands in several places and none of them begins the reply, or where a
    token "1" may be the start of "10" and nothing tells how often it was."""
    if written != int(written):
        return None
    at = [i for i, token in enumerate(tokens) if _integer(token["token"]) == written]
    first = next((i for i, token in enumerate(tokens) if token["token"].strip()), None)
    if not at or (len(at) > 1 and at[0] != first):
        return None
    mass: dict[int, float] = {}
    for candidate in tokens[at[0]].get("top_logprobs") or []:
        number = _integer(candidate["token"])
        if number is not None and low <= number <= high:
            mass[number] = mass.get(number, 0.0) + math.exp(candidate["logprob"])
    whole_tokens = int(high) < 10 or int(high) in mass  # the tokenizer has "10" as one token
    if not mass or (not whole_tokens and mass.get(1, 0.0) > 0.001):
        return None
    total = math.fsum(mass.values())
    return math.fsum(number * p for number, p in mass.items()) / total if total > 0.5 else None


def _integer(token: str) -> int | None:
    match = re.fullmatch(r"[\s:*▁Ġ]*(\d{1,2})[\s*]*", token)
    return int(match[1]) if match else None
