"""With several processes: what labels a batch as a whole sees the whole batch, whatever the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

from dualign.annotate.base import Annotator, Item, Session
from dualign.common.processes import Processes
from dualign.common.types import Label

Close = Callable[[Session], Mapping[int, Label]]


@runtime_checkable
class Meeting(Protocol):
    """A session that has something to do with the other processes before it is closed."""

    def meet(self, close: Close) -> None: ...


class Together:
    """An annotator that is asked by the first process, for the completions of all. Its sessions must `meet`."""

    def __init__(self, annotator: Annotator, processes: Processes) -> None:
        self.annotator, self.processes = annotator, processes
        self.name = annotator.name

    def open(self) -> TogetherSession:
        return TogetherSession(self)

    def close(self) -> None:
        self.annotator.close()


class TogetherSession:
    def __init__(self, together: Together) -> None:
        self._processes = together.processes
        # opened now, as a session's memory is that of the batch which is current: when all meet, another may be
        self._session = None if together.processes.rank else together.annotator.open()
        self._items: list[Item] = []
        self._labels: dict[int, Label] = {}

    def add(self, item: Item) -> None:
        self._items.append(item)

    def meet(self, close: Close) -> None:
        """Labels the items of all processes, by index; all must call this, once each has added its own. `close` waits
        for the labels of a session. An error in the first process is raised in all."""
        items = self._processes.everyones(lambda: self._items)

        def label() -> list[tuple[int, Label]]:
            if self._session is None:
                return []
            for item in sorted(items, key=lambda item: item.index):
                self._session.add(item)
            return list(close(self._session).items())

        labels = dict(self._processes.everyones(label))
        self._labels = {item.index: labels[item.index] for item in self._items}

    def close(self) -> dict[int, Label]:
        return self._labels


def meet(session: Session, close: Close) -> None:
    """Has a session's completions labelled with those of the other processes, where its annotator needs to see all."""
    if isinstance(session, Meeting):
        session.meet(close)
