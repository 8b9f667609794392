"""A run's own evaluations: when, on what is held out, and what the summary says of the first and the last."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from dualign.annotate.told import absent_words
from dualign.common.errors import AbsentError, UserError
from dualign.common.types import Example
from dualign.config import Config
from dualign.rollout.base import Request
from dualign.rollout.own import OwnSampler
from dualign.run.batch import Row
from dualign.run.folder import Run
from dualign.run.journal import Book
from dualign.training.engine import Engine
from dualign.training.heldout import HeldOut, evaluate, gains
from dualign.training.heldout_set import HeldOutSet, changes, evaluate_set
from dualign.training.labeller import Labeller
from dualign.training.machine import Machine
from dualign.training.source import load_heldout
from dualign.training.view import View
from dualign.training.witness import Witness


class Evaluations:
    """On prompts, whose answers are judged by the run's reward; without one, on rows of a fixed set (`heldout_set`)."""

    def __init__(
        self,
        config: Config,
        machine: Machine,
        engine: Engine,
        run: Run,
        labeller: Labeller | None,
        witness: Witness,
        view: View,
    ) -> None:
        self.config, self.machine, self.engine, self.run = config, machine, engine, run
        self.labeller, self.witness, self.view = labeller, witness, view
        self.heldout = self._load()

    def _load(self) -> list[Request] | list[Example]:
        if self.config.data.eval is None or (self.labeller is None and self.config.algo.source == "online"):
            return []
        if self.run.batch_path(0).exists() and not self.run.ever_evaluated:
            self.view.say("note: the run began without evaluations and continues without")
            return []
        self._check_first()
        return load_heldout(self.config, self.engine, self.view.say, self.labeller is not None)

    def _check_first(self) -> None:
        """Raises UserError where the first evaluation is lost and training is past it: nothing could make it again."""
        first, found = self.run.evaluation_path(0), self.run.resumable()
        if found and found.name > first.stem and not first.exists():
            raise UserError(
                f"{first}: missing, and training is past it ({found}). To make it again, delete {self.run.checkpoints}/* "
                "and resume: the stored batches are replayed from the first"
            )

    def notes(self, stream: Sequence[Request] | Sequence[Example]) -> list[str]:
        """What to know of the held-out numbers before one relies on them. `stream`: what is trained on."""
        notes = in_both(stream, self.heldout)
        if self.heldout and self.labeller and isinstance(sampler := self.labeller.sampler, OwnSampler):
            notes.append(f"note: {sampler.engine} also answers the held-out prompts")
        return notes

    def due(self, done: int) -> bool:
        every = self.config.eval.every
        return done == 0 or bool(every and done % every == 0)

    def evaluate(self, done: int, ready: Callable[[], None]) -> None:
        """Of the policy after `done` online batches, unless a run that was killed since has done it; then the witness.
        `ready` makes the sampler that policy."""
        if not self.heldout:
            return
        if not self.run.evaluation_path(done).exists():
            self._evaluate(done, ready)
            self.machine.processes.barrier()
        if self.labeller is not None and (found := self.witness.heldout(done)):
            self.machine.track(done, {"heldout": found})

    def _evaluate(self, done: int, ready: Callable[[], None]) -> None:
        self.view.phase(done, "evaluating on what is held out")
        self.engine.free_memory()
        result: HeldOut | HeldOutSet
        if self.labeller is None:
            result, rows = evaluate_set(self.config, self.engine, self.heldout, done)  # type: ignore[arg-type]
        else:
            ready()
            stem = self.run.evaluation_path(done).with_suffix("")
            book = self.run.journal.begin(stem)
            result, rows = evaluate(self.config, self.engine, self.labeller, self.heldout, done)  # type: ignore[arg-type]
            where = f"held-out evaluation after {done} online batches"
            stop_if_absent(book, self.config.train.max_absent, where, rows, needed=True)
            self.run.journal.end(stem)
        if self.machine.processes.main:
            self.run.write_evaluation(done, rows, result.record())
        self.machine.track(done, {"heldout": result.record()})
        self.view.evaluation(result)

    def before_and_after(self, total: int) -> dict[str, Any]:
        """For the summary: both evaluations' means, and the paired differences; nothing where nothing is held out."""
        if not self.heldout:
            return {}
        (first_rows, first), (last_rows, last) = (self.run.read_evaluation(done) for done in (0, total))
        found = {"before": first, "after": last}
        if self.labeller is None:
            return found | {"changes": changes(first_rows, last_rows)}
        penalty = self.config.rollout.missing_eos_penalty
        return found | {"penalty": penalty} | gains(first_rows, last_rows, penalty)


def in_both(trained: Sequence[Any], heldout: Sequence[Any]) -> list[str]:
    """A note where prompts that are held out are trained on as well; else none. Of prompts, or of what has one."""
    prompts, held = ([getattr(each, "prompt", each) for each in rows] for rows in (trained, heldout))
    texts = {prompt.text for prompt in held}  # few share one, so that few are compared as a whole
    seen = {json.dumps(prompt.content) for prompt in prompts if prompt.text in texts}
    count = sum(json.dumps(prompt.content) in seen for prompt in held)
    told = f"note: {count} of {len(held)} held-out prompts are also in data.train: their answers are not held out"
    return [told] if count else []


def stop_if_absent(book: Book, limit: float, where: str, rows: Sequence[Row], needed: bool = False) -> None:
    """Raises AbsentError where a larger share than `limit` (train.max_absent) of the completions has no label, or none
    has one that is `needed`. A resume asks for those again."""
    absent = [row.label for row in rows if row.label.value is None]
    if rows and len(absent) / len(rows) > limit:
        why = f"more than train.max_absent={limit} allows"
    elif needed and len(absent) == len(rows):
        why = "and without any there is nothing to report"
    else:
        return
    book.retry_absent()
    raise AbsentError(
        f"{where}: {len(absent)} of {len(rows)} completions have no label, {why}. Reasons: {absent_words(absent)}"
    )
