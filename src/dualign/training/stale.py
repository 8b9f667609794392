"""Completions of an older policy: batches that are sampled ahead, and batches that are trained on again.

Both are weighted for π_t, the policy at the time they are used, by log μ of the policy that sampled them; see
`Algorithm.off_policy`. Nothing that was labelled is labelled again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from dualign.common.errors import UserError
from dualign.common.processes import Processes
from dualign.common.types import Label, Rollout
from dualign.config import Config
from dualign.run import replay
from dualign.run.batch import Row, WeightedBatch, check_finite, labelled, recorded_logp
from dualign.run.folder import Run
from dualign.run.journal import Book
from dualign.training.clock import Clock
from dualign.training.engine import Engine
from dualign.training.gap import check_sampler
from dualign.training.labeller import Asked
from dualign.training.source import Source


@dataclass(frozen=True)
class Begun:
    """An online batch that is sampled, whose labels are on their way."""

    asked: Asked
    book: Book
    behaviour: Mapping[int, Sequence[float]] | None  # log μ by row, where the policy moves before the batch is used


class Ahead:
    """Batches that are begun before they are used: the next `rollout.ahead` of them are sampled by π_t of the batch that
    is about to be trained on, so that their labels come while it is."""

    def __init__(self, config: Config, engine: Engine, run: Run, source: Source, processes: Processes) -> None:
        self.config, self.engine, self.run = config, engine, run
        self.source, self.processes = source, processes
        self._begun: dict[int, Begun] = {}
        self.owed: frozenset[int] = frozenset()  # what the checkpoint that training resumes from says was sampled

    @property
    def begun(self) -> list[int]:
        """The batches that are sampled ahead and whose labels are on their way."""
        return sorted(step for step, begun in self._begun.items() if begun.behaviour is not None)

    def due(self, step: int) -> list[int]:
        """The batches that are to be begun before `step` is trained on."""
        last = min(step + self.config.rollout.ahead, self.config.train.online_batches - 1)
        return [s for s in range(step, last + 1) if s not in self._begun and not self.run.batch_path(s).exists()]

    def begin(self, step: int, clock: Clock) -> None:
        """Samples batch `step`. Where the policy that should have is gone, it must be there already: raises UserError
        otherwise."""
        stem = self.run.batch_path(step).with_suffix("")
        book = self.run.journal.begin(stem)
        if step in self.owed and any(index not in book.behaviour for index in range(self.config.train.online_batch)):
            raise UserError(
                f"{stem}.*.journal: missing or cut short, and {self.run.resumable()} is past the policy that sampled it. "
                "Delete that checkpoint and resume: training resumes from an earlier one, and samples the batch again"
            )
        asked = self.source.ask(step, clock)
        self._begun[step] = Begun(asked, book, self._behaviour(step, asked, book, clock))

    def finish(self, step: int, clock: Clock, carried: Mapping[str, float]) -> tuple[Begun, WeightedBatch]:
        """Waits for the labels of batch `step`, of all processes. `carried`: what the last batch left for it."""
        begun = self._begun[step]
        rows = self.processes.everyones(lambda: begun.asked.rows(clock))
        del self._begun[step]  # not before: who stops while it waits owes the batch
        return begun, labelled(step, rows, carried)

    def _behaviour(self, step: int, asked: Asked, book: Book, clock: Clock) -> Mapping[int, Sequence[float]] | None:
        """log μ of all processes' completions. Once it is on disk, and they with it, the policy may move on."""
        if not self.config.rollout.ahead:
            return None
        rollouts: list[Rollout] = self.processes.everyones(lambda: asked.rollouts)
        if all(rollout.index in book.behaviour for rollout in rollouts):
            return book.behaviour
        b = labelled(step, [Row(rollout, Label(0.0)) for rollout in rollouts])
        with clock("score"):
            scored_NT = None
            if self.config.rollout.log_probs == "recomputed":
                scored_NT = self.engine.score(self.engine.policy, b.tokens)
            check_sampler(self.config, self.engine, b, scored_NT)
        behaviour_NT = recorded_logp(b) if scored_NT is None else scored_NT
        found = {row.rollout.index: logp_T[: len(row.rollout.completion_ids)].tolist()
                 for row, logp_T in zip(b.rows, behaviour_NT, strict=True)}  # fmt: skip
        book.add_behaviour(found, mine={rollout.index for rollout in asked.rollouts})
        self.processes.barrier()
        return found


def earlier(config: Config, engine: Engine, run: Run, b: WeightedBatch, clock: Clock) -> Iterator[WeightedBatch]:
    """The earlier batches that are trained on again after `b` (train.reuse), each weighted for the policy as it is when
    its turn comes. What a run that was killed has weighted since is taken from its folder."""
    for of in (b.step - age for age in config.train.reuse if age <= b.step):
        use = run.read_reused(b.step, of)
        if use is None:
            first = run.batch(of)
            with clock("score"):
                old_NT = engine.score(engine.policy, first.tokens)
            batch = replace(
                first.batch, logp_old_NT=old_NT, logp_behaviour_NT=first.sampled_NT, carried=b.batch.carried
            )
            use = replay.again(replace(first, batch=batch, used_in=b.step), config.algo)
            check_finite(use, lambda name, tokens: engine.not_finite(engine.policy, tokens))
            with clock("write"):
                if engine.processes.main:
                    run.write_reused(use)
                engine.processes.barrier()
        yield use
