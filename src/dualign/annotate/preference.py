"""AI preference: which of two completions an LLM judge finds better, asked in both orders.

Where both orders name the same completion it is the winner; where they name the same *position* the judge follows
position and not content, and the pair is a tie, kept as such. A rubric whose question asks for the loser (which is
more harmful?) is turned round. Here neighbours meet; the designs in which all of a prompt's completions do, and one
request that asks for their order, are in `contest`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from dualign.annotate import extract
from dualign.annotate.base import Item, Session
from dualign.annotate.client import Client
from dualign.annotate.contest import ALONE, ContestSession
from dualign.annotate.endpoints import PreferenceReward
from dualign.annotate.judge import chat, in_text, wants_of
from dualign.annotate.ranking import ranking
from dualign.annotate.reply import read_reply
from dualign.annotate.request import Payload
from dualign.annotate.rubric import load
from dualign.common.types import Label, Prompt

Side = Literal["a", "b"]
log = logging.getLogger(__name__)
COUNTED, BIASED = 100, 0.2  # comparisons from which a share of more than so much beside a half is told


@dataclass(frozen=True)
class Verdict:
    """What both orders said of a pair (a, b). `value` is a's: 1 won, 0 lost, 0.5 tie, None absent."""

    ab: Side | None  # the better one when a was shown first
    ba: Side | None  # the better one when b was shown first
    reason: str | None = None
    note: str | None = None
    asks: Literal["winner", "loser"] = "winner"  # which one the judge was asked to name

    @property
    def named_first(self) -> float | None:
        """Of the two answers, the share that named what was shown first: 0.5 where the judge goes by content."""
        if self.ab is None or self.ba is None:
            return None
        better = ((self.ab == "a") + (self.ba == "b")) / 2
        return better if self.asks == "winner" else 1 - better

    @property
    def value(self) -> float | None:
        if self.ab is None or self.ba is None:
            return None
        return {("a", "a"): 1.0, ("b", "b"): 0.0}.get((self.ab, self.ba), 0.5)


@dataclass(frozen=True)
class Asked:
    """A pair that is being judged."""

    ab: list[Future[Label]]
    ba: list[Future[Label]]
    asks: Literal["winner", "loser"]

    def verdict(self) -> Verdict:
        """Waits. With several samples, an order's answer is its majority's; a draw is no answer."""
        ab, ba = [f.result() for f in self.ab], [f.result() for f in self.ba]
        first, second = _majority(ab), _majority(ba)
        reasons = [label.reason for label in (*ab, *ba) if label.reason]
        note = "\n---\n".join(label.note for label in (*ab, *ba) if label.note) or None
        reason = None if first and second else (reasons or ["the samples of one order are split"])[0]
        swapped: dict[int | None, Side | None] = {1: "b", 2: "a", None: None}
        straight: dict[int | None, Side | None] = {1: "a", 2: "b", None: None}
        return Verdict(straight[first], swapped[second], reason, note, self.asks)


class PreferenceAnnotator:
    def __init__(self, settings: PreferenceReward, *, ledger: Path | None = None) -> None:
        self.rubric = load(settings.rubric, ranking=settings.pairs == "ranking")
        self.name = settings.name or self.rubric.name
        self.settings = settings
        self.asks = self.rubric.check("ranking" if settings.pairs == "ranking" else settings.type).preference_answer
        self.client = Client(settings, ledger=ledger)
        self.whole_groups = settings.pairs != "neighbours"
        self.named_first: float | None = None  # share of the last batch's comparisons that named what stood earlier
        self._told = False

    def open(self) -> Session:
        return ContestSession(self) if self.whole_groups else PreferenceSession(self)

    def close(self) -> None:
        self.client.close()

    def compare(self, prompt: Prompt, a: str, b: str) -> Asked:
        """Starts asking which of `a` and `b` is better, in both orders."""
        return Asked(self._order(prompt, a, b), self._order(prompt, b, a), self.asks)

    def asked_text(self, prompt: Prompt, a: str, b: str) -> str:
        """What the judge reads of a pair, in the first order, for people."""
        return in_text(self.rubric.preference_messages(prompt, a, b, self.settings.reply))

    def rank(self, prompt: Prompt, responses: Sequence[str], sample: int = 0) -> Future[Label]:
        """Starts asking for the order of `responses`, shown as they stand. Of the label that is not absent, `parts`
        holds each response's tier by its number, from 1: 0 is the best, equals share one."""
        form = self.settings.reply
        messages, more = self.rubric.ranking_messages(prompt, responses, form), wants_of("ranking", form, self.rubric)

        def read(payload: Payload) -> Label:
            reply = read_reply(payload)
            found = ranking(reply.text, len(responses), cut=reply.cut, echoes=(*responses, *prompt.texts))
            if found.tiers is None:
                return Label.absent(found.reason or "no ranking in the reply", note=reply.note)
            parts = {str(number): float(at) for at, tier in enumerate(found.tiers) for number in tier}
            return Label(1.0, parts=parts, note=reply.note)

        return self.client.submit(chat(self.settings, messages, f"{self.rubric.name} (ranking)", sample, more), read)

    def count(self, first: Iterable[Sequence[float]]) -> None:
        """Takes how many comparisons a batch had, and how many named what stood earlier; says once where that decides."""
        asked, named = np.sum([[0.0, 0.0], *first], axis=0)
        if not asked:
            return
        self.named_first = float(named / asked)
        if asked >= COUNTED and abs(self.named_first - 0.5) > BIASED and not self._told:
            self._told = True
            counted = f"{self.named_first:.0%} of {asked:.0f} comparisons named what was shown earlier"
            cure = " (samples: 2 shows each order and its reverse)" if self.settings.pairs == "ranking" else ""
            log.warning("warning: %s: %s; this judge goes by position%s", self.name, counted, cure)

    def _order(self, prompt: Prompt, first: str, second: str) -> list[Future[Label]]:
        form = self.settings.reply
        messages = self.rubric.preference_messages(prompt, first, second, form)
        asks, more = self.asks, wants_of("pair", form, self.rubric)

        def read(payload: Payload) -> Label:
            reply = read_reply(payload)
            found = extract.choice(reply.text, asks=asks, cut=reply.cut, echoes=(first, second, *prompt.texts))
            if found.value is None:
                return Label.absent(found.reason or "no choice in the reply", note=reply.note)
            return Label(found.value if asks == "winner" else 3 - found.value, note=reply.note)

        return [
            self.client.submit(chat(self.settings, messages, f"{self.rubric.name} (pairs)", sample, more), read)
            for sample in range(self.settings.samples)
        ]


class PreferenceSession:
    """Completions 2j and 2j+1 of one prompt meet, as soon as both are there; what is left of a group meets at the
    end, and an odd one out is absent."""

    def __init__(self, annotator: PreferenceAnnotator) -> None:
        self._annotator = annotator
        self._alone: dict[int, Item] = {}
        self._asked: list[tuple[Item, Item, Asked]] = []

    def add(self, item: Item) -> None:
        other = self._alone.get(item.index ^ 1)
        if other is None or other.group != item.group:
            self._alone[item.index] = item
            return
        del self._alone[other.index]
        self._meet(*sorted((item, other), key=lambda i: i.index))

    def close(self) -> dict[int, Label]:
        waiting: dict[int, Item] = {}  # by group
        for item in sorted(self._alone.values(), key=lambda i: i.index):
            other = waiting.pop(item.group, None)
            if other is None:
                waiting[item.group] = item
            else:
                self._meet(other, item)
        labels = {item.index: self._label(None, ALONE, None) for item in waiting.values()}
        for a, b, asked in self._asked:
            verdict = asked.verdict()
            other_value = None if verdict.value is None else 1 - verdict.value
            labels[a.index] = self._label(verdict.value, verdict.reason, verdict.note)
            labels[b.index] = self._label(other_value, verdict.reason, verdict.note)
        return labels

    def _meet(self, a: Item, b: Item) -> None:
        self._asked.append((a, b, self._annotator.compare(a.prompt, a.completion, b.completion)))

    def _label(self, value: float | None, reason: str | None, note: str | None) -> Label:
        return Label(value, None if value is not None else reason, {self._annotator.name: value}, note)


def _majority(labels: list[Label]) -> int | None:
    votes = [int(label.value) for label in labels if label.value is not None]
    ones = votes.count(1)
    return None if 2 * ones == len(votes) else 1 if 2 * ones > len(votes) else 2
