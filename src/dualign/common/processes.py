"""What the processes of a run say to one another: everyone's items, and everyone's faults."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from dualign.common.errors import StopRun, UserError

X = TypeVar("X")


class Processes(Protocol):
    """The processes of a run, as one of them sees them (the engine)."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather(self, items: list[X]) -> list[X]:
        """The items of all processes, on all of them, in the order of ranks."""
        ...


def everyones(processes: Processes, make: Callable[[], Sequence[X]]) -> list[X]:
    """What `make` returns in this process and in the others. An error in one process is raised in all: each of them
    comes here, or none goes on."""
    mine: list[X | BaseException]
    try:
        mine = list(make())
    except (UserError, StopRun) as error:
        if processes.world == 1:
            raise
        mine = [error]
    found: list[X] = []
    for item in processes.gather(mine):
        if isinstance(item, BaseException):
            raise item
        found.append(item)
    return found
