"""Samples completions and has them labelled. The labels come while other things are done."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from dualign.annotate.base import Annotator, Item, Session
from dualign.annotate.together import Meeting, meet
from dualign.common.errors import StopRun, out_of_memory
from dualign.common.processes import Processes
from dualign.common.types import Label, Rollout
from dualign.rollout.base import Request, Sampler, Sampling
from dualign.run.batch import Row
from dualign.run.journal import Journal
from dualign.training.clock import Clock

X = TypeVar("X")
STOP_WITHIN = 0.5  # seconds after which a wish to stop is noticed while labels are awaited


@dataclass(frozen=True)
class Asked:
    """An online batch whose completions, those of this process, are there, and whose labels are on their way."""

    rollouts: Sequence[Rollout]
    rows: Callable[[Clock], list[Row]]  # waits for the labels


@dataclass(frozen=True)
class Labeller:
    """Samples from π_t and has the completions labelled, each sent off the moment it is finished. What `journal` has
    of the current batch is taken from there; `check` raises where one asked to stop. With several `processes`, all label
    a batch together."""

    sampler: Sampler
    annotator: Annotator
    journal: Journal
    check: Callable[[], None]
    processes: Processes = field(default_factory=Processes)
    # what labels a batch as a whole, as a Python function, is asked for one batch at a time
    _one: threading.Lock = field(default_factory=threading.Lock)

    def rows(self, requests: Sequence[Request], sampling: Sampling, seed: tuple[int, int], clock: Clock) -> list[Row]:
        """K labelled completions of each request."""
        return self.ask(requests, sampling, seed, clock).rows(clock)

    def ask(self, requests: Sequence[Request], sampling: Sampling, seed: tuple[int, int], clock: Clock) -> Asked:
        """K completions of each request, each sent to be labelled."""
        session = self.annotator.open()
        rollouts: list[Rollout] = []

        def sample() -> Sequence[Rollout]:
            with clock("sample"):
                rollouts.extend(self._sample(requests, sampling, seed, session))
            return ()  # each process keeps its own

        self.processes.everyones(sample)
        together = self.processes.world > 1 and isinstance(session, Meeting)
        closing = None if together else closed(session, self._one, self.journal)

        def rows(clock: Clock) -> list[Row]:
            with clock("label"):
                if closing is None:
                    meet(session, partial(awaited, check=self.check, journal=self.journal))
                labels = result(closing or closed(session, self._one, self.journal), self.check)
            return [Row(rollout, labels[rollout.index]) for rollout in sorted(rollouts, key=lambda r: r.index)]

        return Asked(rollouts, rows)

    def begun(self, requests: Sequence[Request], k: int) -> int:
        """How many of the first of `requests` a run that was ended meanwhile has asked for, in the current batch."""
        groups = {rollout.group for rollout in self.journal.current.rollouts(requests, k).values()}
        return max((at + 1 for at, request in enumerate(requests) if request.group in groups), default=0)

    def record(self) -> dict[str, dict[str, float]]:
        """The seconds of each reward in the batch that was labelled last, where there are several. They run side by
        side, within the phase "label" and during "sample"."""
        stats = getattr(self.annotator, "stats", {}).items()
        each = {name.removesuffix("/seconds"): v for name, v in stats if name.endswith("/seconds")}
        return {"label_seconds": each} if each else {}

    def _sample(
        self, requests: Sequence[Request], sampling: Sampling, seed: tuple[int, int], session: Session
    ) -> list[Rollout]:
        """K completions of each request, in the order in which they were sent to be labelled."""
        book = self.journal.current
        held = book.rollouts(requests, sampling.k)
        rollouts: list[Rollout] = []

        def take(rollout: Rollout) -> None:
            rollouts.append(rollout)
            session.add(Item.of(rollout, sampling.k))

        def done(rollout: Rollout) -> None:
            self.check()
            if rollout.index not in held:  # what was labelled stands
                book.add_rollout(rollout)
                take(rollout)

        for rollout in held.values():
            take(rollout)
        try:
            self.sampler.sample(requests, sampling, seed, done, held)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise StopRun(
                "out of memory while sampling; resume with a smaller rollout.options.decode_batch_size"
            ) from None
        return rollouts


def awaited(session: Session, check: Callable[[], None], journal: Journal) -> Mapping[int, Label]:
    """The labels of a session that is complete."""
    return result(closed(session, threading.Lock(), journal), check)


def closed(session: Session, one: threading.Lock, journal: Journal) -> Future[Mapping[int, Label]]:
    """Closes a session beside whatever else is done, once `one` is free. The `journal` stays open for its labels."""
    answer: Future[Mapping[int, Label]] = Future()
    journal.expect(answer)

    def work() -> None:
        try:
            with one:
                answer.set_result(session.close())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, name="labels", daemon=True).start()
    return answer


def result(answer: Future[X], check: Callable[[], None]) -> X:
    """Waits for it, but not when asked to stop (`check` raises): what is bought by then is still written down
    (Journal.end)."""
    while not wait([answer], timeout=STOP_WITHIN).done:
        check()
    return answer.result()
