"""Asks a run's witness: about some completions of each n-th batch and held-out answers. It never costs a run anything
but time: a witness that fails leaves labels absent, or is asked no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualign import annotate
from dualign.annotate.base import Item
from dualign.common.errors import StopRun, UserError
from dualign.common.interrupt import Interrupts, StopAsked
from dualign.common.processes import Processes
from dualign.common.types import Label
from dualign.config import Config
from dualign.config.sections import WitnessConfig
from dualign.run import parting
from dualign.run.batch import Row, WeightedBatch
from dualign.run.folder import Run
from dualign.run.journal import Journal, files_of
from dualign.run.witness import OWN, Kind, Look, Witnessed, chosen, file_name, look_of, planned, read, to_text
from dualign.training.clock import Clock
from dualign.training.labeller import awaited

Put = Callable[[Path, str], None]  # writes a file durably


class Asking:
    """Makes looks in a folder, one after the other. A look that is there is never made again; what a killed one had
    bought is in its journal. One that fails is raised, or if it is `spared` its labels are absent and it is the last.
    Raises UserError for a witness that cannot be built."""

    def __init__(
        self,
        settings: WitnessConfig,
        seed: int,
        plan: Sequence[tuple[Kind, int]],
        folder: Path,
        put: Put,
        spared: bool = False,
    ) -> None:
        self.settings, self.seed, self.plan = settings, seed, plan
        self.folder, self.put, self.spared = folder, put, spared
        folder.mkdir(exist_ok=True)
        self.journal = Journal()
        self.annotator = annotate.build(settings.reward, (), folder, self.journal)
        self.seen = read(folder)
        self.fault = ""  # why it is asked no more

    def due(self, kind: Kind, step: int) -> bool:
        made = self.seen.batches if kind == "batch" else self.seen.heldout
        return not self.fault and (kind, step) in self.plan and step not in made

    def look(self, kind: Kind, step: int, rows: Sequence[Row], check: Callable[[], None]) -> Look:
        """Asks about some of `rows`, tests and writes down. `check` raises StopAsked where one asked to stop."""
        path = self.folder / file_name(kind, step)
        asked = chosen(rows, kind, step, self.settings, self.seed)
        labels = self._labels(path.with_suffix(""), asked, check)
        spent = sum(look.test.level for look in self.seen.looks if look.test)
        to_come = self.plan[self.plan.index((kind, step)) :]
        level = parting.level(self.settings.alpha, spent, len(to_come))
        look = look_of(kind, step, self.annotator.name, rows, labels, self.seen, level)
        self.put(path, to_text(look))
        for journal in files_of(path.with_suffix("")):
            journal.unlink()
        self.seen = Witnessed(self.folder, [*self.seen.looks, look])
        return look

    def _labels(self, stem: Path, rows: Sequence[Row], check: Callable[[], None]) -> Mapping[int, Label]:
        self.journal.begin(stem)
        try:
            session = self.annotator.open()
            for row in rows:
                session.add(Item.of(row.rollout))
            labels = awaited(session, check, self.journal)
        except StopAsked:
            raise  # `close` writes down what is bought by then
        except (UserError, StopRun) as error:
            if not self.spared:
                raise
            self.fault = str(error)
            labels = {row.rollout.index: Label.absent(f"the witness failed: {error}") for row in rows}
        self.journal.end(stem)
        return labels

    def close(self) -> None:
        self.annotator.close()
        self.journal.end()


class Witness:
    """That of a run in training; without `witness` in its configuration nothing happens. The first process asks."""

    def __init__(
        self,
        config: Config,
        run: Run,
        processes: Processes,
        interrupts: Interrupts,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.processes, self.interrupts, self.say = run, processes, interrupts, say
        self.settings, self.total = config.witness, config.train.online_batches
        self.asking: Asking | None = None
        if config.witness:
            processes.everyones(lambda: self._build(config, config.witness))  # what cannot be built ends all of them

    def _build(self, config: Config, settings: WitnessConfig | None) -> Sequence[None]:
        if settings and self.processes.main:
            plan = planned(config, settings)
            self.asking = Asking(settings, config.run.seed, plan, self.run.witness_dir, self._put, spared=True)
        return ()

    def _put(self, path: Path, text: str) -> None:
        self.run.write_text(f"{OWN}/{path.name}", text)

    def __enter__(self) -> Witness:
        return self

    def __exit__(self, *error: object) -> None:
        if self.asking:
            self.asking.close()

    def batch(self, b: WeightedBatch, clock: Clock) -> None:
        """Asks about an online batch, if it is one of the n-th. Raises StopAsked in all processes or none."""
        if self.settings:
            with clock("witness"):
                self._look("batch", b.step, lambda: b.rows)

    def heldout(self, done: int) -> dict[str, Any]:
        """Asks about the stored evaluation after `done` online batches; what it found, for trackers."""
        self._look("heldout", done, lambda: self.run.read_evaluation(done)[0])
        look = self.asking.seen.heldout.get(done) if self.asking else None
        return look.record() if look else {}

    def _look(self, kind: Kind, step: int, rows: Callable[[], Sequence[Row]]) -> None:
        def make() -> Sequence[Look]:
            if self.asking is None or not self.asking.due(kind, step):
                return ()
            before = self.asking.seen.spoke
            self._tell(self.asking, self.asking.look(kind, step, rows(), self.interrupts.check), before is None)
            return ()

        if self.settings:
            self.processes.everyones(make)

    def _tell(self, asking: Asking, look: Look, first: bool) -> None:
        if look.kind == "heldout" or asking.fault or (look.spoke and first):  # else it stands in the batch's line
            self.say(look.text(told=first))
        if asking.fault:
            self.say(f"note: the witness is asked no more, the run goes on: {asking.fault}")
        if look.spoke and first and asking.settings.stop and look.step < self.total:
            self.say(f"stopping, as witness.stop has it; `dualign resume {self.run.folder}` goes on all the same")
            self.interrupts.requested = self.interrupts.requested or "the witness"

    def record(self, step: int) -> dict[str, Any]:
        """What metrics.jsonl has of an online batch."""
        look = self.asking.seen.batches.get(step) if self.asking else None
        return look.record() if look else {}

    def summary(self) -> dict[str, Any]:
        """What summary.json has of the run, in words too: whether it spoke, and the best checkpoint."""
        if not self.asking:
            return {}
        for line in verdict(self.asking.seen, self.run):
            self.say(line)
        return {"witness": self.asking.seen.summary(steps(self.run))}


def steps(run: Run) -> list[int]:
    """After how many online batches there are checkpoints."""
    return [int(path.name) for path in run.saved() if "+" not in path.name]


def verdict(seen: Witnessed, run: Run) -> list[str]:
    """What a witness found, in words."""
    spoke, tests = seen.spoke, [look for look in seen.looks if look.test]
    if spoke:
        lines = [spoke.text(told=True)]
    elif tests:
        lines = [f"witness {seen.by}: at none of {len(tests)} looks did reward and witness part"]
    else:
        lines = [f"witness {seen.by}: nothing to compare: π_0 or all later policies have no label"]
    if best := seen.best(steps(run)):
        step, look = best
        first = (seen.batches if look.kind == "batch" else seen.heldout).get(0)
        there = look.record()["witness"]
        was = first.record()["witness"] if first else None
        below = ", no better than π_0" if was is not None and there <= was else ""
        lines.append(
            f"best checkpoint by the witness: {step} ({there:+.3f}{below}); dualign export {run.folder}@{step}"
        )
    return lines
