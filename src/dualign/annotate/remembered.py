"""Labels that outlive the process: what was labelled before a run was killed is not asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from dualign.annotate.base import Annotator, Item, Partly, Session
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Label


class Labels(Protocol):
    """Of a batch in progress, by annotator and item index. `add_labels` returns once they are on disk. `ending`: the run
    is being stopped, and nothing more is to be bought."""

    @property
    def ending(self) -> bool: ...

    def labels(self, annotator: str) -> Mapping[int, Label]: ...

    def add_labels(self, annotator: str, labels: Mapping[int, Label]) -> None: ...


class Memory(Protocol):
    """The labels of batches in progress. A session stays with that which was current when it was opened."""

    @property
    def current(self) -> Labels: ...


class Remembered:
    """An annotator with a memory. `key` tells it apart from the run's other annotators. What labels a batch as a
    `whole` is asked for all of it or not at all; what is remembered stands. What compares the completions of a prompt is
    asked for the whole of a group in which any has no label, and says all of it anew."""

    def __init__(self, annotator: Annotator, key: str, memory: Memory, whole: bool = False) -> None:
        self.annotator, self.key, self.memory, self.whole = annotator, key, memory, whole
        self.whole_groups = getattr(annotator, "whole_groups", False)
        self.name = annotator.name

    def open(self) -> Session:
        return _RememberedSession(self)

    def close(self) -> None:
        self.annotator.close()


class _RememberedSession:
    def __init__(self, remembered: Remembered) -> None:
        self._key, self._memory, self._whole = remembered.key, remembered.memory.current, remembered.whole
        self._groups = remembered.whole_groups
        self._known = self._memory.labels(self._key)
        self._session = remembered.annotator.open()
        self._labels: dict[int, Label] = {}
        self._fresh = False  # whether there is anything to ask for
        self._open_groups: set[int] = set()  # in which something is asked for
        self._settled: list[Item] = []  # what is known; a whole batch is asked for with it

    def add(self, item: Item) -> None:
        if item.index in self._known:
            self._labels[item.index] = self._known[item.index]
            self._settled.append(item)
            return
        self._session.add(item)
        self._fresh = True
        self._open_groups.add(item.group)

    def close(self) -> dict[int, Label]:
        for item in self._settled:
            if self._groups and item.group in self._open_groups:
                del self._labels[item.index]
            if item.index not in self._labels or (self._whole and self._fresh):
                self._session.add(item)
        try:
            if self._memory.ending:
                raise StopRun("the run was stopped before these labels were asked for")
            given = self._session.close()
        except (StopRun, UserError):
            self._memory.add_labels(self._key, bought(self._session))
            raise
        fresh = {index: label for index, label in given.items() if index not in self._labels}
        self._memory.add_labels(self._key, fresh)  # at once: until this returns, a kill would lose what was bought
        return self._labels | fresh


def bought(session: Session) -> dict[int, Label]:
    """The labels that a session has, though it cannot be closed: of one that does not say which (`so_far`), none. What is
    absent may come yet."""
    found = session.so_far() if isinstance(session, Partly) else {}
    return {index: label for index, label in found.items() if label.value is not None}
