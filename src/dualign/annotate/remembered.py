"""Labels that outlive the process: what was labelled before a run was killed is not asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dualign.annotate.base import Annotator, Item, Session
from dualign.common.types import Label


class Memory(Protocol):
    """Labels of the batch in progress by annotator and item index. `add_labels` returns once they are on disk."""

    def labels(self, annotator: str) -> Mapping[int, Label]: ...

    def add_labels(self, annotator: str, labels: Mapping[int, Label]) -> None: ...


class Remembered:
    """An annotator with a memory. `key` tells it apart from the run's other annotators. What labels a batch as a
    `whole` is asked for all of it or not at all; what is remembered stands."""

    def __init__(self, annotator: Annotator, key: str, memory: Memory, whole: bool = False) -> None:
        self.annotator, self.key, self.memory, self.whole = annotator, key, memory, whole
        self.name = annotator.name

    def open(self) -> Session:
        return _RememberedSession(self)

    def close(self) -> None:
        self.annotator.close()


class _RememberedSession:
    def __init__(self, remembered: Remembered) -> None:
        self._key, self._memory, self._whole = remembered.key, remembered.memory, remembered.whole
        self._known = self._memory.labels(self._key)
        self._session = remembered.annotator.open()
        self._labels: dict[int, Label] = {}
        self._fresh = False  # whether there is anything to ask for
        self._settled: list[Item] = []  # what is known; a whole batch is asked for with it

    def add(self, item: Item) -> None:
        if item.index in self._known:
            self._labels[item.index] = self._known[item.index]
            self._settled.append(item)
            return
        self._session.add(item)
        self._fresh = True

    def close(self) -> dict[int, Label]:
        if self._whole and self._fresh:
            for item in self._settled:
                self._session.add(item)
        given = self._session.close()
        fresh = {index: label for index, label in given.items() if index not in self._labels}
        self._memory.add_labels(self._key, fresh)  # at once: until this returns, a kill would lose what was bought
        return self._labels | fresh
