"""AI reward: an LLM judge's score of one completion, asked for while others are still being decoded."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dualign.annotate import batch, extract, forms
from dualign.annotate.base import Item
from dualign.annotate.checklist import Checklist, Criterion, of_row, told, total, yes_or_no
from dualign.annotate.client import Client
from dualign.annotate.endpoints import ROOM, JudgeReward, JudgeSampling
from dualign.annotate.expected import expected_score
from dualign.annotate.reply import read_reply
from dualign.annotate.request import Payload, Request
from dualign.annotate.rubric import LackingError, Rubric, load, of_tree, parse
from dualign.common.errors import UserError
from dualign.common.types import Label, Message, Prompt

Row = TypeVar("Row")
Asked = TypeVar("Asked")


@dataclass(frozen=True)
class Scored:
    """One completion that is being scored."""

    name: str
    samples: Sequence[Future[Label]]

    @property
    def there(self) -> bool:
        """Whether every sample has its label."""
        return all(future.done() and future.exception() is None for future in self.samples)

    def label(self) -> Label:
        """Waits. The mean of the samples' scores as one label. Raises what ended the run."""
        labels = [future.result() for future in self.samples]
        values = [label.value for label in labels if label.value is not None]
        note = "\n---\n".join(label.note for label in labels if label.note) or None
        if not values:
            return Label.absent(labels[0].reason or "absent", note=note, parts={self.name: None})
        value = math.fsum(values) / len(values)
        return Label(value, parts={self.name: value}, note=note)


@dataclass(frozen=True)
class Checked:
    """One completion that is held against a checklist: what is asked for each criterion."""

    name: str
    sign: int
    criteria: Sequence[Criterion]
    asked: Sequence[Scored]

    @property
    def there(self) -> bool:
        return all(each.there for each in self.asked)

    def label(self) -> Label:
        """Waits. Criteria without a verdict do not count; without any, the label is absent."""
        verdicts = [_majority(each.label()) for each in self.asked]
        value, note = total(self.criteria, verdicts), told(self.criteria, verdicts)
        if value is None:
            reasons = [verdict.reason for verdict in verdicts if verdict.reason]
            why = reasons[0] if reasons else "no criterion with a weight above 0 has a verdict"
            return Label.absent(why, note=note, parts={self.name: None})
        return Label(self.sign * value, parts={self.name: self.sign * value}, note=note)


def _majority(verdict: Label) -> Label:
    """Of several samples of one criterion; a draw is no verdict."""
    if verdict.value is None or verdict.value in (0, 1):
        return verdict
    if verdict.value == 0.5:
        return Label.absent("the samples are split", note=verdict.note)
    return Label(float(verdict.value > 0.5), note=verdict.note)


class JudgeAnnotator:
    """A label is sign * score, averaged over the samples that gave one, or sign * the share of a checklist that is met;
    its note is the judge's own words."""

    def __init__(self, settings: JudgeReward, *, ledger: Path | None = None) -> None:
        self.rubric = load(settings.rubric)
        self.name = settings.name or self.rubric.name
        self.settings = settings
        self._rubrics = Rubrics(settings.rubric_column, self.rubric)
        self.client = Client(settings, ledger=ledger)

    def open(self) -> JudgeSession:
        return JudgeSession(self)

    def close(self) -> None:
        self.client.close()

    def ask(self, item: Item) -> Scored | Checked:
        """Starts asking for one completion. Raises UserError for a row that does not fit the rubric."""
        try:
            rubric = self._rubrics.of(item.prompt)
            if rubric.checklist:
                criteria = criteria_of(rubric.checklist, item.prompt)
                asked = [self._verdict(rubric, item, criterion) for criterion in criteria]
                return Checked(self.name, rubric.sign, criteria, asked)
            return self._score(rubric, item)
        except LackingError as lacking:
            absent: Future[Label] = Future()
            absent.set_result(Label.absent(str(lacking)))
            return Scored(self.name, [absent])

    def asked_text(self, item: Item) -> str:
        """What the judge reads of one completion, for people; of a checklist, with the first criterion."""
        rubric, form = self._rubrics.of(item.prompt), self.settings.reply
        try:
            if rubric.checklist:
                first = criteria_of(rubric.checklist, item.prompt)[0]
                return in_text(rubric.criterion_messages(item.prompt, item.completion, first, form))
            return in_text(rubric.reward_messages(item.prompt, item.completion, form))
        except LackingError as lacking:
            return f"(nothing: {lacking})"

    def combine(self, asked: Scored | Checked) -> Label:
        return asked.label()

    def _score(self, rubric: Rubric, item: Item) -> Scored:
        expected, form = self.settings.expected_score, self.settings.reply
        more = wants_of("score", form, rubric) | ({"top_logprobs": 20} if expected else {})

        def read(payload: Payload) -> Label:
            return read_score(payload, rubric, item.completion, item.prompt, expected=expected, form=form)

        return self._submit(rubric.reward_messages(item.prompt, item.completion, form), rubric, more, read)

    def _verdict(self, rubric: Rubric, item: Item, criterion: Criterion) -> Scored:
        form = self.settings.reply
        echoes = (item.completion, criterion.text, *item.prompt.texts)

        def read(payload: Payload) -> Label:
            reply = read_reply(payload)
            found = yes_or_no(reply.text, reply.cut, echoes)
            if found.value is None:
                return Label.absent(found.reason or "no verdict in the reply", note=reply.note)
            return Label(found.value, note=reply.note)

        messages = rubric.criterion_messages(item.prompt, item.completion, criterion, form)
        return self._submit(messages, rubric, wants_of("criterion", form, rubric), read)

    def _submit(
        self, messages: list[Message], rubric: Rubric, more: Mapping[str, Any], read: Callable[[Payload], Label]
    ) -> Scored:
        requests = [chat(self.settings, messages, rubric.name, i, more) for i in range(self.settings.samples)]
        return Scored(self.name, [self.client.submit(request, read) for request in requests])


class Rubrics:
    """The rubric of each row: the one that its `column` names or holds, else the common one."""

    def __init__(self, column: str | None, common: Rubric) -> None:
        self.column, self.common = column, common
        self._known: dict[str, Rubric] = {}

    def of(self, prompt: Prompt) -> Rubric:
        """Raises UserError, with the row, for what is no rubric."""
        value = prompt.columns.get(self.column) if self.column else None
        if value is None or value == "":
            return self.common
        key = value if isinstance(value, str) else json.dumps(value, sort_keys=True, default=str)
        if key not in self._known:
            where = f"{prompt}, column {self.column}"
            if isinstance(value, str) and "\n" not in value and not value.lstrip().startswith("{"):
                self._known[key] = load(value)
            else:
                self._known[key] = parse(value, where) if isinstance(value, str) else of_tree(value, where)
        return self._known[key]


def criteria_of(checklist: Checklist, prompt: Prompt) -> list[Criterion]:
    """The checklist's own criteria, then the row's."""
    if checklist.column is None:
        return checklist.criteria
    if checklist.column not in prompt.columns:
        have = ", ".join(sorted(prompt.columns)) or "none"
        raise UserError(f"checklist.column: {checklist.column!r} is no column of the data ({prompt}; it has: {have})")
    value = prompt.columns[checklist.column]
    own = [] if value is None else of_row(value, f"{prompt}, column {checklist.column}")
    if not checklist.criteria and not own:
        raise LackingError(f"the row has no criteria in {checklist.column!r}")
    return [*checklist.criteria, *own]


class JudgeSession:
    def __init__(self, annotator: JudgeAnnotator) -> None:
        self._annotator = annotator
        self._asked: dict[int, Scored | Checked] = {}

    def add(self, item: Item) -> None:
        self._asked[item.index] = self._annotator.ask(item)

    def close(self) -> dict[int, Label]:
        return {index: self._annotator.combine(asked) for index, asked in self._asked.items()}

    def so_far(self) -> dict[int, Label]:
        return {index: self._annotator.combine(asked) for index, asked in self._asked.items() if asked.there}


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


def in_text(messages: Sequence[Message]) -> str:
    return "\n\n".join(str(message["content"]) for message in messages)


def chat(
    settings: JudgeSampling,
    messages: list[Message],
    rubric: str,
    sample: int = 0,
    more: Mapping[str, Any] | None = None,
) -> Request:
    """`more`: wants of this request beside the settings' own (see `dialect`)."""
    wants = {"temperature": settings.temperature, "max_tokens": settings.reply_tokens, **(more or {})}
    wants |= {"thinking": settings.thinking} if settings.thinking else {}
    wants |= {"stop": settings.stop} if settings.stop else {}
    body = {"messages": messages, **settings.extra_body}
    if settings.chat_template_kwargs:
        body["chat_template_kwargs"] = {**body.get("chat_template_kwargs", {}), **settings.chat_template_kwargs}
    return Request("chat/completions", body, rubric, sample, wants, 0 if settings.max_tokens else ROOM)


def wants_of(question: forms.Question, form: forms.Form, rubric: Rubric) -> dict[str, Any]:
    """What a reply in this form asks of the server. Raises UserError where the rubric's scale has no list of choices."""
    try:
        return forms.wants(question, form, rubric.scale)
    except ValueError as error:
        raise UserError(f"rubric {rubric.name}: {error}") from None


def read_score(
    payload: Payload,
    rubric: Rubric,
    completion: str,
    prompt: Prompt | None = None,
    *,
    expected: bool = False,
    form: forms.Form = "text",
) -> Label:
    """The label of a reply; absent, with the reason, for one that states no score."""
    reply = read_reply(payload)
    low, high = rubric.scale
    echoes = prompt.texts if prompt else ()
    found = extract.score(reply.text, low=low, high=high, cut=reply.cut, echo=completion, echoes=echoes)
    if found.value is None:
        return Label.absent(found.reason or "no score in the reply", note=reply.note)
    mean = expected_score(reply.tokens, found.value, low, high, guided=form != "text") if expected else None
    return Label(rubric.sign * (found.value if mean is None else mean), note=reply.note)
