"""Several rewards at once: their weighted sum, labelled side by side."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from dualign.annotate.base import Annotator, Item, Session
from dualign.annotate.together import Close, meet
from dualign.common.types import Label


@dataclass(frozen=True)
class Term:
    """One reward of the sum, under a name that no other has."""

    name: str
    annotator: Annotator
    weight: float = 1.0
    optional: bool = False  # where it has no label the others decide; otherwise such a row is absent
    where: Mapping[str, Any] = field(default_factory=dict)  # rows whose columns have these values; empty: all
    clip: Sequence[float] | None = None  # low, high: bounds of the value, before it is weighted

    @property
    def plain(self) -> bool:
        """Whether the sum of this term alone is its annotator's own label."""
        return self.weight == 1 and not self.where and self.clip is None

    def weighted(self, value: float) -> float:
        low, high = self.clip or (value, value)
        return self.weight * min(max(value, low), high)

    def applies(self, item: Item) -> bool:
        return all(item.prompt.columns.get(column) == value for column, value in self.where.items())


class CombinedAnnotator:
    """Σ weight · reward over the terms, each reward within its bounds where it has some. `stats` holds, for the batch
    labelled last, NAME/seconds (from the batch's end to that term's last label) and NAME/absent (share of rows that
    the term did not label)."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.terms = tuple(terms)
        self.name = " + ".join(term.name for term in terms)
        self.stats: dict[str, float] = {}

    def open(self) -> Session:
        return _CombinedSession(self)

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, also where another one fails
            for term in self.terms:
                stack.callback(term.annotator.close)


class _CombinedSession:
    def __init__(self, combined: CombinedAnnotator) -> None:
        self._combined = combined
        self._sessions = [term.annotator.open() for term in combined.terms]
        self._indices: list[int] = []
        self._met = [0.0] * len(combined.terms)  # seconds

    def add(self, item: Item) -> None:
        self._indices.append(item.index)
        for term, session in zip(self._combined.terms, self._sessions, strict=True):
            if term.applies(item):
                session.add(item)

    def meet(self, close: Close) -> None:
        for at, session in enumerate(self._sessions):  # in the same order in all processes
            start = time.perf_counter()
            meet(session, close)
            self._met[at] = time.perf_counter() - start

    def close(self) -> dict[int, Label]:
        terms = self._combined.terms
        with ThreadPoolExecutor(len(terms)) as pool:
            closed = list(pool.map(_timed_close, self._sessions))
        for term, met, (labels, seconds) in zip(terms, self._met, closed, strict=True):
            absent = sum(label.value is None for label in labels.values()) / max(len(labels), 1)
            self._combined.stats |= {f"{term.name}/seconds": met + seconds, f"{term.name}/absent": absent}
        return {index: combine(terms, [labels.get(index) for labels, _ in closed]) for index in sorted(self._indices)}


def _timed_close(session: Session) -> tuple[dict[int, Label], float]:
    start = time.perf_counter()
    return session.close(), time.perf_counter() - start


def combine(terms: Sequence[Term], given: Sequence[Label | None]) -> Label:
    """One completion's label from each term's (None: the term does not apply to it). Absent where a term that is not
    optional is absent, or all are."""
    both = [(term, label) for term, label in zip(terms, given, strict=True) if label is not None]
    if not both:
        return Label.absent("no reward applies to this row: none of their `where` matches its columns")
    terms, labels = [term for term, _ in both], [label for _, label in both]
    parts = {term.name: label.value for term, label in zip(terms, labels, strict=True)}
    reasons = [(t, f"{t.name}: {x.reason}") for t, x in zip(terms, labels, strict=True) if x.value is None]
    needed = [reason for term, reason in reasons if not term.optional]
    if needed or len(reasons) == len(terms):
        return Label.absent("; ".join(needed or [reason for _, reason in reasons]), parts=parts)
    total = sum(t.weighted(x.value) for t, x in zip(terms, labels, strict=True) if x.value is not None)
    notes = [f"{t.name}: {x.note}" for t, x in zip(terms, labels, strict=True) if x.note]
    return Label(total, parts=parts, note="\n".join(notes) or None)
