"""Several rewards as one: labelled side by side, each bounded, normalised and weighted, then joined."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from dualign.annotate.base import Annotator, Item, Session
from dualign.annotate.normalised import RAW, normalised
from dualign.annotate.settings import Gate
from dualign.annotate.together import Close, meet
from dualign.common.processes import Processes
from dualign.common.types import Label

Join = Callable[[Sequence[float]], float]  # sum, min, ...


@dataclass(frozen=True)
class Term:
    """One reward among several, under a name that no other has."""

    name: str
    annotator: Annotator
    weight: float = 1.0
    optional: bool = False  # where it has no label the others decide; otherwise such a row is absent
    where: Mapping[str, Any] = field(default_factory=dict)  # rows whose columns have these values; empty: all
    clip: Sequence[float] | None = None  # low, high: bounds of the value, before it is normalised and weighted
    normalise: Literal["none", "group", "batch"] = "none"
    gate: Gate | None = None  # it adds nothing, and decides whether the others count

    @property
    def plain(self) -> bool:
        """Whether the label of this term alone is its annotator's own."""
        return self.weight == 1 and not self.where and self.clip is None and self.normalise == "none" and not self.gate

    def bounded(self, value: float) -> float:
        low, high = self.clip or (value, value)
        return min(max(value, low), high)

    def applies(self, item: Item) -> bool:
        return all(item.prompt.columns.get(column) == value for column, value in self.where.items())


class CombinedAnnotator:
    """`join` of weight · reward over the terms that are no gates, each reward within its bounds and normalised where it
    says so; absent where fewer than `least` of them have a label. `stats` holds, for the batch labelled last,
    NAME/seconds (from the batch's end to that term's last label) and NAME/absent (share of rows that the term did not
    label), of terms within terms as well."""

    def __init__(
        self,
        terms: Sequence[Term],
        join: Join = sum,
        least: int = 1,
        name: str = "",
        processes: Processes = Processes(),  # noqa: B008 (frozen)
    ) -> None:
        self.terms, self.join, self.least, self.processes = tuple(terms), join, least, processes
        self.name = name or " + ".join(term.name for term in terms)
        self.stats: dict[str, float] = {}

    def open(self) -> Session:
        return _CombinedSession(self)

    def close(self) -> None:
        with ExitStack() as stack:  # each is closed, also where another one fails
            for term in self.terms:
                stack.callback(term.annotator.close)


Bounded = tuple[int, int, list[float | None]]  # index and group of a completion, its value of each term


class _CombinedSession:
    def __init__(self, combined: CombinedAnnotator) -> None:
        self._combined = combined
        self._sessions = [term.annotator.open() for term in combined.terms]
        self._groups: dict[int, int] = {}  # by index
        self._met = [0.0] * len(combined.terms)  # seconds
        self._given: list[dict[int, Label]] | None = None  # each term's labels
        self._everyones: list[Bounded] | None = None

    def add(self, item: Item) -> None:
        self._groups[item.index] = item.group
        for term, session in zip(self._combined.terms, self._sessions, strict=True):
            if term.applies(item):
                session.add(item)

    def meet(self, close: Close) -> None:
        for at, session in enumerate(self._sessions):  # in the same order in all processes
            start = time.perf_counter()
            meet(session, close)
            self._met[at] = time.perf_counter() - start
        if any(term.normalise == "batch" for term in self._combined.terms):

            def mine() -> list[Bounded]:
                close(self)  # waits for the labels
                return self._bounded()

            self._everyones = self._combined.processes.everyones(mine)

    def close(self) -> dict[int, Label]:
        combined = self._combined
        if self._given is None:
            self._given = self._labels()
        values = self._everyones or self._bounded()
        standing = [_normalised(term, at, values) for at, term in enumerate(combined.terms)]
        return {
            index: combine(
                combined.terms,
                [labels.get(index) for labels in self._given],
                [z.get(index) for z in standing],
                combined.join,
                combined.least,
            )
            for index in sorted(self._groups)
        }

    def _labels(self) -> list[dict[int, Label]]:
        """Of each term, side by side."""
        terms, stats = self._combined.terms, self._combined.stats
        with ThreadPoolExecutor(len(terms)) as pool:
            closed = list(pool.map(_timed_close, self._sessions))
        for term, met, (labels, seconds) in zip(terms, self._met, closed, strict=True):
            absent = sum(label.value is None for label in labels.values()) / max(len(labels), 1)
            if isinstance(term.annotator, CombinedAnnotator):
                stats |= term.annotator.stats
            stats |= {f"{term.name}/seconds": met + seconds, f"{term.name}/absent": absent}
        return [labels for labels, _ in closed]

    def _bounded(self) -> list[Bounded]:
        """What is normalised: of every completion here, each term's value within its bounds."""
        assert self._given is not None
        found = []
        for index, group in self._groups.items():
            labels = [labels.get(index) for labels in self._given]
            terms = zip(self._combined.terms, labels, strict=True)
            values = [None if x is None or x.value is None else t.bounded(x.value) for t, x in terms]
            found.append((index, group, values))
        return found


def _normalised(term: Term, at: int, values: Sequence[Bounded]) -> dict[int, float]:
    """By index; empty where the term is not normalised."""
    if term.normalise == "none":
        return {}
    scope = {index: group if term.normalise == "group" else 0 for index, group, _ in values}
    return normalised({index: x for index, _, each in values if (x := each[at]) is not None}, scope)


def _timed_close(session: Session) -> tuple[dict[int, Label], float]:
    start = time.perf_counter()
    return session.close(), time.perf_counter() - start


def combine(
    terms: Sequence[Term],
    given: Sequence[Label | None],
    standing: Sequence[float | None] = (),
    join: Join = sum,
    least: int = 1,
) -> Label:
    """One completion's label from each term's (None: the term does not apply to it). Absent where a term that is not
    optional is absent, or all are. `standing`: the normalised value of each term that is normalised. The label's parts
    keep every reward unweighted, unbounded and not normalised, and the whole without normalisation (RAW)."""
    standing = standing or [None] * len(terms)
    there = [(t, x, z) for t, x, z in zip(terms, given, standing, strict=True) if x is not None]
    if not there:
        return Label.absent("no reward applies to this row: none of their `where` matches its columns")
    parts: dict[str, float | None] = {}
    for t, x, _ in there:
        within = dict(x.parts) if isinstance(t.annotator, CombinedAnnotator) else {}
        own = within.pop(RAW, x.value)
        parts |= within | {t.name: own}
    reasons = [(t, f"{t.name}: {x.reason}") for t, x, _ in there if x.value is None]
    needed = [reason for t, reason in reasons if not t.optional]
    counted = [t for t, x, _ in there if x.value is not None and t.gate is None]
    if needed or len(counted) < least:
        why = needed or [reason for _, reason in reasons]
        few = f"{len(counted)} of its rewards have a label here, and it needs {least}"
        return Label.absent(
            "; ".join(why or [few if least > 1 else "no reward but gates applies to this row"]), parts=parts
        )
    labelled = [(t, x, z) for t, x, z in there if x.value is not None]
    value = _joined([(t, x.value if z is None else z, z is None) for t, x, z in labelled], join)
    raw = _joined([(t, parts[t.name], True) for t, *_ in labelled], join)
    if not math.isfinite(value):
        return Label.absent("its rewards together are more than a number can hold", parts=parts)
    if any(z is not None or RAW in x.parts for _, x, z in labelled):
        parts[RAW] = raw
    notes = [f"{t.name}: {x.note}" for t, x, _ in labelled if x.note]
    return Label(value, parts=parts, note="\n".join(notes) or None)


def _joined(values: Sequence[tuple[Term, Any, bool]], join: Join) -> float:
    """(term, value, whether it is still to be bounded): what the first closed gate says, or `join` of the others."""
    for term, value, _ in values:
        if term.gate is not None and not term.gate.passes(value):
            return term.gate.otherwise
    return join([t.weight * (t.bounded(x) if raw else x) for t, x, raw in values if t.gate is None])
