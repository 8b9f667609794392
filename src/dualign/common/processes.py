"""The processes of a run: what each works on, and what they say to one another."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from dualign.common.errors import StopRun, UserError

X = TypeVar("X")


@dataclass(frozen=True)
class Processes:
    """The processes of a run, as one of them sees them: `rank` of `world`. One alone needs no others."""

    rank: int = 0
    world: int = 1
    barrier: Callable[[], None] = lambda: None  # waits until all processes are here

    @classmethod
    def current(cls) -> Processes:
        """Those that this process has joined; itself alone where it has joined none."""
        from torch import distributed

        if not (distributed.is_available() and distributed.is_initialized()):
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size(), distributed.barrier)

    @property
    def main(self) -> bool:
        """Whether this process writes the run's folder."""
        return self.rank == 0

    @property
    def machine(self) -> tuple[int, bool]:
        """The number of the machine that this process is on, and whether it is the first one there."""
        if self.world == 1:
            return 0, True
        local, count = (int(os.environ.get(name, "0")) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        return (self.rank // count if count else 0), local == 0

    def mine(self, items: Sequence[X]) -> Sequence[X]:
        """The share of `items` that this process works on."""
        return items[self.rank :: self.world]

    def gather(self, items: list[X]) -> list[X]:
        """The items of all processes, on all of them, in the order of ranks."""
        if self.world == 1:
            return items
        import torch

        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, items)
        return [item for part in parts for item in part]

    def depart(self, within: float) -> None:
        """Waits until all processes are here, so many seconds at most: a launcher ends the others once one has failed."""
        if self.world == 1:
            return
        until = time.monotonic() + within
        with suppress(ImportError, RuntimeError):  # torch has no public way to the store; who keeps it has departed
            from torch.distributed.distributed_c10d import _get_default_store

            store = _get_default_store()
            store.add("departed", 1)
            while store.add("departed", 0) < self.world and time.monotonic() < until:
                time.sleep(0.05)

    def everyones(self, make: Callable[[], Sequence[X]]) -> list[X]:
        """What `make` returns in this process and in the others. An error in one process is raised in all: each of them
        comes here, or none goes on."""
        mine: list[X | BaseException]
        try:
            mine = list(make())
        except (UserError, StopRun) as error:
            if self.world == 1:
                raise
            mine = [error]
        found: list[X] = []
        for item in self.gather(mine):
            if isinstance(item, BaseException):
                raise item
            found.append(item)
        return found
