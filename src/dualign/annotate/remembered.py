"""Labels that outlive the process: what was labelled before a run was killed is not asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dualign.annotate.base import Annotator, Item, Session
from dualign.types import Label


class Memory(Protocol):
    """Labels of the batch in progress by annotator and item index. `add_labels` returns once they are on disk."""

    def labels(self, annotator: str) -> Mapping[int, Label]: ...

    def add_labels(self, annotator: str, labels: Mapping[int, Label]) -> None: ...


class Remembered:
    """An annotator with a memory. `key` tells it apart from the run's other annotators."""

    def __init__(self, annotator: Annotator, key: str, memory: Memory) -> None:
        self.annotator, self.key, self.memory = annotator, key, memory
        self.name = annotator.name

    def open(self) -> Session:
        return _RememberedSession(self)

    def close(self) -> None:
        self.annotator.close()


class _RememberedSession:
    def __init__(self, remembered: Remembered) -> None:
        self._key, self._memory = remembered.key, remembered.memory
        self._known = self._memory.labels(self._key)
        self._session = remembered.annotator.open()
        self._labels: dict[int, Label] = {}

    def add(self, item: Item) -> None:
        if item.index in self._known:
            self._labels[item.index] = self._known[item.index]
        else:
            self._session.add(item)

    def close(self) -> dict[int, Label]:
        fresh = self._session.close()
        self._memory.add_labels(self._key, fresh)  # at once: until this returns, a kill would lose what was bought
        return self._labels | fresh
