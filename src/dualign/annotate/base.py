"""What labels a completion: one small protocol that judges, reward models and Python functions share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dualign.common.types import Label, Prompt, Rollout


@dataclass(frozen=True)
class Item:
    """One completion to be labelled. `index` orders the answers; items of one `group` share a prompt.
    `completion_ids`: its tokens; None where they are not known. `group_size`: how many items its group has, where
    that is known."""

    index: int
    group: int
    prompt: Prompt
    completion: str
    completion_ids: tuple[int, ...] | None = ()
    group_size: int | None = None

    @staticmethod
    def of(rollout: Rollout, k: int | None = None) -> Item:
        """A sampled completion, one of `k` of its prompt, with all that a reward may read of it."""
        return Item(rollout.index, rollout.group, rollout.prompt, rollout.text, rollout.completion_ids, k)


class Session(Protocol):
    """The labelling of one online batch. `add` must return at once: completions arrive while others are being
    decoded. `close` waits for what is outstanding and returns every label by item index."""

    def add(self, item: Item) -> None: ...

    def close(self) -> dict[int, Label]: ...


@runtime_checkable
class Partly(Protocol):
    """A session that tells which labels are there already, where what ended the run keeps others from coming."""

    def so_far(self) -> dict[int, Label]: ...


@runtime_checkable
class Annotator(Protocol):
    """Opens one session per online batch. Raises UserError for what the user must fix (a reward function that
    raises or returns the wrong length), StopRun for what ends the run cleanly (a spent budget, a dead judge). One whose
    labels depend on the rest of the batch says `whole_batch = True`: several processes then ask once, for all. One whose
    labels depend on the rest of a prompt's completions says `whole_groups = True`: they are asked for together."""

    name: str

    def open(self) -> Session: ...

    def close(self) -> None: ...


class BatchSession:
    """A session for annotators that label a whole batch in one call."""

    def __init__(self, label: Callable[[Sequence[Item]], list[Label]]) -> None:
        self._label = label
        self._items: list[Item] = []

    def add(self, item: Item) -> None:
        self._items.append(item)

    def close(self) -> dict[int, Label]:
        items = sorted(self._items, key=lambda item: item.index)
        return dict(zip((item.index for item in items), self._label(items), strict=True)) if items else {}


def label_all(annotator: Annotator, items: Sequence[Item]) -> list[Label]:
    """Labels of `items`, in their order."""
    session = annotator.open()
    for item in items:
        session.add(item)
    labels = session.close()
    return [labels[item.index] for item in items]
