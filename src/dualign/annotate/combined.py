"""Several rewards at once: their weighted sum, labelled side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

from dualign.annotate.base import Annotator, Item, Session
from dualign.types import Label


@dataclass(frozen=True)
class Term:
    """One reward of the sum, under a name that no other has."""

    name: str
    annotator: Annotator
    weight: float = 1.0
    optional: bool = False  # where it has no label the others decide; otherwise such a row is absent


class CombinedAnnotator:
    """Σ weight · reward over the terms. `stats` holds, for the batch labelled last, NAME/seconds (from the batch's
    end to that term's last label) and NAME/absent (share of rows that the term did not label)."""

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

    def add(self, item: Item) -> None:
        for session in self._sessions:
            session.add(item)

    def close(self) -> dict[int, Label]:
        terms = self._combined.terms
        with ThreadPoolExecutor(len(terms)) as pool:
            closed = list(pool.map(_timed_close, self._sessions))
        for term, (labels, seconds) in zip(terms, closed, strict=True):
            absent = sum(label.value is None for label in labels.values()) / max(len(labels), 1)
            self._combined.stats |= {f"{term.name}/seconds": seconds, f"{term.name}/absent": absent}
        return {index: combine(terms, [labels[index] for labels, _ in closed]) for index in closed[0][0]}


def _timed_close(session: Session) -> tuple[dict[int, Label], float]:
    start = time.perf_counter()
    return session.close(), time.perf_counter() - start


def combine(terms: Sequence[Term], labels: Sequence[Label]) -> Label:
    """One completion's label from each term's. Absent where a term that is not optional is absent, or all are."""
    parts = {term.name: label.value for term, label in zip(terms, labels, strict=True)}
    reasons = [(t, f"{t.name}: {x.reason}") for t, x in zip(terms, labels, strict=True) if x.value is None]
    needed = [reason for term, reason in reasons if not term.optional]
    if needed or len(reasons) == len(terms):
        return Label.absent("; ".join(needed or [reason for _, reason in reasons]), parts=parts)
    total = sum(t.weight * x.value for t, x in zip(terms, labels, strict=True) if x.value is not None)
    notes = [f"{t.name}: {x.note}" for t, x in zip(terms, labels, strict=True) if x.note]
    return Label(total, parts=parts, note="\n".join(notes) or None)
