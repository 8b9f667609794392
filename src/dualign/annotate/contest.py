"""The K completions of a prompt, compared by a design: every pair, a tournament, or all in one request.

A contest begins when its prompt's completions are all there, and goes on by itself while others are being decoded: a
tournament's next round is asked for when the last answer of the one before arrives. What chance decides (who meets
first, which response stands where) is a function of the texts alone, so that a contest that is held again asks for what
is in the cache.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from dualign.annotate.base import Item
from dualign.annotate.designs import SCORES, Pair, all_pairs, default_rounds, next_round
from dualign.common.types import Label

if TYPE_CHECKING:
    from dualign.annotate.preference import PreferenceAnnotator

ALONE = "no second completion to compare with"


class Contest:
    """One prompt's completions. `over` is done once all is answered, or holds what ended the run. `wins[i, j]`: how
    often i was better than j, ties half. `first`: of the comparisons of two that were told apart by one request, how
    many there were, and how many named what was shown earlier."""

    def __init__(self, annotator: PreferenceAnnotator, items: Sequence[Item]) -> None:
        self.annotator, self.settings = annotator, annotator.settings
        self.items = sorted(items, key=lambda item: item.index)
        self.prompt, self.texts = self.items[0].prompt, [item.completion for item in self.items]
        self.k = k = len(self.items)
        self.wins, self.met = np.zeros((k, k)), np.zeros((k, k), bool)
        self.rounds = 0
        self.first = [0, 0.0]
        self.notes: list[list[str]] = [[] for _ in range(k)]
        self.reasons: list[list[str]] = [[] for _ in range(k)]
        self.over: Future[None] = Future()
        if k == 1:
            self.over.set_result(None)
        elif self.settings.pairs == "ranking":
            self._goes_on(self._rank)
        else:
            self._goes_on(self._round)

    @cached_property
    def chance(self) -> np.random.Generator:
        texts = "\x00".join([*self.prompt.texts, *self.texts])
        return np.random.default_rng(list(hashlib.sha256(texts.encode()).digest()))

    def _goes_on(self, step: Callable[[], None]) -> None:
        """In the thread of the last answer, where nobody waits for an error."""
        try:
            step()
        except BaseException as error:
            self.over.set_exception(error)

    # --- pairs, in rounds ---

    def _next(self) -> list[Pair]:
        if self.settings.pairs == "all":
            return [] if self.rounds else all_pairs(self.k)
        if self.rounds == (self.settings.rounds or default_rounds(self.k)):
            return []
        return next_round(self.met, np.nan_to_num(SCORES["bradley_terry"](self.wins)), self.chance)

    def _round(self) -> None:
        pairs = self._next()
        if not pairs:
            return self.over.set_result(None)
        self.rounds += 1
        asked = [(p, self.annotator.compare(self.prompt, self.texts[p[0]], self.texts[p[1]])) for p in pairs]

        def take() -> None:
            for (i, j), pair in asked:
                verdict = pair.verdict()
                self.met[i, j] = self.met[j, i] = True
                if verdict.value is not None and verdict.named_first is not None:
                    self._add(i, j, verdict.value)
                    self.first = [self.first[0] + 2, self.first[1] + 2 * verdict.named_first]
                self._tell((i, j), f"completions {i + 1} and {j + 1}: {verdict.note}", verdict.reason)
            self._round()

        when_all([f for _, pair in asked for f in (*pair.ab, *pair.ba)], lambda: self._goes_on(take))

    # --- all in one request ---

    def _rank(self) -> None:
        orders = [self._order(sample) for sample in range(self.settings.samples)]
        asked = [
            self.annotator.rank(self.prompt, [self.texts[i] for i in order], sample)
            for sample, order in enumerate(orders)
        ]

        def take() -> None:
            for order, future in zip(orders, asked, strict=True):
                label = future.result()
                told = f"shown as {', '.join(str(i + 1) for i in order)}: {label.note}"
                self._tell(range(self.k), told, label.reason)
                if label.value is not None:
                    self._placed(order, [label.parts[str(place)] or 0.0 for place in range(1, self.k + 1)])
            self.over.set_result(None)

        when_all(asked, lambda: self._goes_on(take))

    def _order(self, sample: int) -> list[int]:
        """Which completion stands where. Every second order is the one before turned round, so that over the two each
        completion stands before every other one once."""
        if sample % 2 == 0:
            self._shuffled = [int(i) for i in self.chance.permutation(self.k)]
        return self._shuffled if sample % 2 == 0 else self._shuffled[::-1]

    def _placed(self, order: list[int], tier: list[float]) -> None:
        """Adds the pairs that an order implies. `tier`, by place shown: 0 is the best."""
        for a, b in combinations(range(self.k), 2):
            value = (1 + np.sign(tier[b] - tier[a])) / 2
            self._add(order[a], order[b], float(value))
            self.first = [self.first[0] + 1, self.first[1] + value]

    # --- what came of it ---

    def _add(self, i: int, j: int, value: float) -> None:
        self.wins[i, j] += value
        self.wins[j, i] += 1 - value

    def _tell(self, of: Sequence[int], note: str, reason: str | None) -> None:
        for i in of:
            self.notes[i].append(note)
            self.reasons[i] += [reason] if reason else []

    def labels(self) -> dict[int, Label]:
        """Waits. Raises what ended the run."""
        self.over.result()
        values = SCORES[self.settings.score](self.wins)
        return {item.index: self._label(i, float(values[i])) for i, item in enumerate(self.items)}

    def _label(self, i: int, score: float) -> Label:
        value = None if math.isnan(score) else score
        reason = None if value is not None else (self.reasons[i] or [ALONE])[0]
        return Label(value, reason, {self.annotator.name: value}, "\n---\n".join(self.notes[i]) or None)


class ContestSession:
    """A contest for each prompt, begun when its completions are all there; where nobody knows how many there will be,
    at the end."""

    def __init__(self, annotator: PreferenceAnnotator) -> None:
        self._annotator = annotator
        self._waiting: dict[int, list[Item]] = {}  # by group
        self._contests: list[Contest] = []

    def add(self, item: Item) -> None:
        group = self._waiting.setdefault(item.group, [])
        group.append(item)
        if len(group) == item.group_size:
            self._contests.append(Contest(self._annotator, self._waiting.pop(item.group)))

    def close(self) -> dict[int, Label]:
        self._contests += [Contest(self._annotator, items) for _, items in sorted(self._waiting.items())]
        self._waiting = {}
        labels = {index: label for contest in self._contests for index, label in contest.labels().items()}
        self._annotator.count(contest.first for contest in self._contests)
        return labels


def when_all(futures: Sequence[Future[Label]], then: Callable[[], None]) -> None:
    """Calls `then` once, when all are done, in the thread in which the last one was."""
    left, lock = len(futures), threading.Lock()

    def one(_: Future[Label]) -> None:
        nonlocal left
        with lock:
            left -= 1
            last = left == 0
        if last:
            then()

    for future in futures:
        future.add_done_callback(one)
