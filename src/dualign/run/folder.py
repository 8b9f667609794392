"""A run's folder. Nothing half-written is ever read: files are written aside, synced and renamed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dualign.common.errors import UserError
from dualign.common.paths import path_of
from dualign.config import Config, load
from dualign.run import witness
from dualign.run.batch import Row, WeightedBatch, labelled
from dualign.run.files import RunFiles, models_of
from dualign.run.frames import Completions, Records, held_out_stats, is_number, plot, run_html
from dualign.run.journal import files_of
from dualign.run.metrics import MetricsFile, new_names
from dualign.run.table import from_table, from_use, read_table, to_table, to_use
from dualign.run.witness import Witnessed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STATE_FILES = ("state.json", "train.safetensors", "optimizer.safetensors")  # what only the newest checkpoint needs


@dataclass(frozen=True, repr=False)
class Evaluated:
    """An evaluation of the policy after `done` online batches: its means, and every row that was sampled."""

    done: int
    stats: dict[str, Any]
    rows: tuple[Row, ...]

    def __repr__(self) -> str:
        means = [
            f"{name} {value:.3g}" for name in ("reward", "kl", "length") if is_number(value := self.stats.get(name))
        ]
        return f"Evaluated(after {self.done} online batches: {', '.join([f'{len(self.rows)} completions', *means])})"


class Run(RunFiles):
    """runs/NAME: config.yaml, run.json, metrics.jsonl, batches/*.parquet, evaluations/*.parquet, checkpoints/*/,
    summary.json, and the manifest that holds their hashes."""

    @staticmethod
    def open(folder: str | Path) -> Run:
        """An existing run, to be read. Raises UserError where there is none."""
        run = Run(path_of(folder))
        if not run.config_file.is_file():
            raise UserError(f"{folder}: no run here (config.yaml is missing)")
        return run

    # --- reading ---

    @property
    def config(self) -> Config:
        """The configuration that the run was made with."""
        return load(self.config_file)

    @property
    def summary(self) -> dict[str, Any] | None:
        """What a finished run gained; None where it is not finished."""
        path = self.folder / "summary.json"
        if not path.is_file():
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
        return found | {
            when: new_names(found[when]) for when in ("before", "after") if isinstance(found.get(when), dict)
        }

    def steps(self) -> list[int]:
        """The numbers of the online batches that are stored."""
        return _numbers(self.batches)

    def evaluated(self) -> list[int]:
        """After how many online batches there are evaluations."""
        return _numbers(self.evaluations_dir)

    def batch(self, step: int) -> WeightedBatch:
        """An online batch: every completion with its label, and the weights of those that have one. Raises UserError
        where it is not stored."""
        found = self.read_batch(step)
        if found is None:
            raise UserError(f"{self.folder}: online batch {step} is not stored; there are {_told(self.steps())}")
        return found

    def evaluations(self) -> Records[Evaluated]:
        """The run's evaluations on what is held out, the first one of π_0. As a table, their means."""
        found = [Evaluated(done, *reversed(self.read_evaluation(done))) for done in self.evaluated()]
        return Records(found, lambda each: {"done": each.done, **each.stats})

    def completions(
        self, step: int | Sequence[int] | None = None, *, held_out: bool = False, tokens: bool = False
    ) -> Completions:
        """Every stored completion, or those of some online batches, with labels and weights. `held_out`: those of the
        evaluations instead, `step` being how many batches were done. `tokens`: with the columns that hold a value per
        token. Raises UserError for a batch that is not stored."""
        have = self.evaluated() if held_out else self.steps()
        asked = have if step is None else [step] if isinstance(step, int) else list(step)
        if missing := [each for each in asked if each not in have]:
            kind = "evaluation after batch" if held_out else "online batch"
            raise UserError(f"{self.folder}: {kind} {missing[0]} is not stored; there are {_told(have)}")
        place = self.evaluation_path if held_out else self.batch_path
        return Completions({each: place(each) for each in asked}, tokens)

    def plot(self, *names: str) -> Figure:
        """A figure of these metrics, in training and held out; without names, of the usual ones. Needs the extra
        `plots`. Raises UserError for a metric that the run does not have."""
        held_out = {done: held_out_stats(self.evaluation_path(done)) for done in self.evaluated()}
        return plot(self.folder.name, self.metrics(), held_out, names)

    def witness(self, name: str | None = None) -> Witnessed:
        """What a witness said: the run's own, or that which `dualign witness` asked by this `name`. Where the run has
        none of its own, the only other. Raises UserError where there is none."""
        have = witness.folders(self.folder)
        of = {path.name.removeprefix(witness.OWN).removeprefix("-"): path for path in have}
        found = of.get(name or "") or (have[0] if name is None and len(have) == 1 else None)
        if found is None:
            others = ", ".join(other for other in of if other) or "none"
            raise UserError(f"{self.folder}: no witness {name or 'of its own'}; asked afterwards: {others}")
        return witness.read(found)

    def best(self) -> Path | None:
        """The checkpoint that the witness rates highest; None where it has rated none. Raises UserError without one."""
        whole = {int(path.name): path for path in self.saved() if "+" not in path.name}
        found = self.witness().best(list(whole))
        return whole[found[0]] if found else None

    def checkpoint(self, which: int | Literal["latest", "best"] = "latest") -> Path:
        """The folder of a checkpoint, for from_pretrained: the latest, the best by the witness, or that after so many
        online batches. Raises UserError where there is none."""
        if which == "best":
            if (best := self.best()) is None:
                raise UserError(f"{self.folder}: no checkpoint that the witness has rated")
            return best
        saved = {path.name: path for path in self.saved()}
        name = list(saved)[-1] if saved and which == "latest" else f"{which:06d}" if which != "latest" else ""
        if name not in saved:
            have = ", ".join(str(int(n)) if n.isdigit() else n for n in saved) or "none"
            raise UserError(f"{self.folder}: no checkpoint {which}; there are {have}")
        return saved[name]

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}: {self._state()})"

    def _state(self) -> str:
        if not self.config_file.is_file():
            return "no run here"
        try:
            config, done = self.config, len(self.metrics())
        except UserError as error:
            return str(error)
        ended = "finished" if self.summary is not None else "not finished"
        return f"{config.algo.name}, {done} of {config.train.online_batches} online batches, {ended}"

    def _repr_html_(self) -> str:
        """What Jupyter shows."""
        try:
            records, summary = self.metrics(), self.summary or {}
            facts = {"model": self.config.model.name, "train": str(self.config.data.train)}
        except UserError:
            return run_html(str(self.folder), self._state(), {}, {})
        if is_number(gain := summary.get("gain")):
            half = summary.get("gain_ci")
            facts["held-out gain"] = f"{gain:+.3f}" + (f" ± {half:.3f}" if is_number(half) else "")
        names = ("reward", "kl", "length", "loss")
        curves = {name: [r[name] for r in records if is_number(r.get(name))] for name in names}
        return run_html(str(self.folder), self._state(), facts, curves)

    # --- online batches ---

    def batch_path(self, step: int) -> Path:
        return self.batches / f"{step:06d}.parquet"

    def write_batch(self, b: WeightedBatch) -> None:
        """The whole batch, durable before the first update that uses it. Its journal has done its work."""
        self._write_table(self.batch_path(b.step), to_table(b))

    def _write_table(self, path: Path, table: pa.Table) -> None:
        self._put(path, lambda aside: pq.write_table(table, aside, compression="zstd"))
        for journal in files_of(path.with_suffix("")):
            journal.unlink()

    def read_batch(self, step: int) -> WeightedBatch | None:
        """The batch as it was written, or None if it was not. Raises UserError if it was damaged since."""
        path = self.batch_path(step)
        if not path.exists():
            return None
        self.check(path, "Delete it and resume: its completions will be sampled, and their labels asked for, again")
        return from_table(read_table(path), step)

    # --- batches that are trained on again ---

    def reused_path(self, step: int, of: int) -> Path:
        return self.reused_dir / f"{step:06d}-{of:06d}.parquet"

    def reused(self, step: int) -> list[int]:
        """The earlier batches that were trained on again during online batch `step`, the latest first; also one whose
        file has been lost since."""
        m, begins = self.manifest, f"{self.reused_dir.name}/{step:06d}-"
        recorded = {name for name, known in m.files.items() if name.startswith(begins) and not known.gone}
        stems = {path.stem for path in (*self.folder.glob(f"{begins}*.parquet"), *map(Path, recorded - m.last))}
        return sorted((int(stem.partition("-")[2]) for stem in stems), reverse=True)

    def write_reused(self, b: WeightedBatch) -> None:
        """Log-probs and weights of this use, durable before its first update."""
        assert b.used_in is not None
        self.reused_dir.mkdir(exist_ok=True)
        self._write_table(self.reused_path(b.used_in, b.step), to_use(b))

    def read_reused(self, step: int, of: int) -> WeightedBatch | None:
        """Batch `of` as it was used during `step`, or None. Raises UserError if it, or the batch, is damaged or gone."""
        path, batch = self.reused_path(step, of), self.batch_path(of)
        if not path.exists():
            return None
        self.check(path, f"Delete it and {self.checkpoints}/* and resume: the stored batches are replayed")
        if not batch.exists():
            raise UserError(f"{batch}: missing, and {path} is of it")
        self.check(batch, f"{path} is of it")
        return from_use(read_table(path), read_table(batch), of)

    # --- metrics ---

    @cached_property
    def records(self) -> MetricsFile:
        return MetricsFile(self.metrics_file, self.manifest)

    def metrics(self) -> Records[dict[str, Any]]:
        """One record of each finished online batch, in order."""
        return Records(self.records.read())

    def forget_metrics_from(self, step: int) -> None:
        """Drops the records of batches that are about to be replayed. Raises UserError if an earlier one is missing."""
        kept = [r for r in self.metrics() if r["step"] < step]
        if [r["step"] for r in kept] != list(range(step)):
            raise UserError(
                f"{self.metrics_file}: does not hold every batch before {step}. Delete it and {self.checkpoints}/* and "
                "resume: the stored batches are replayed from the first"
            )
        self.write_text("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        self.__dict__.pop("records", None)

    # --- checkpoints ---

    def save_checkpoint(self, step: int, update: int, write: Callable[[Path], None], keep_last: int | None) -> Path:
        """Checkpoint after `step` online batches and `update` updates of the next. Earlier ones keep their weights for
        evaluation (as many as `keep_last` says, the best by the witness, and those that runs beside this one are made from)
        but hand the training state on to this one."""
        path = self.checkpoints / (f"{step:06d}+{update}" if update else f"{step:06d}")
        if path == self.resumable():
            return path  # what would be written is there, to the last bit
        earlier = [old for old in self.saved() if old != path]
        if path.exists():
            self._drop([path])
        self._put(path, write)
        whole = [old for old in earlier if "+" not in old.name]
        spare = whole[: max(0, len(whole) + 1 - keep_last)] if keep_last else []
        if spare:
            best = self.best() if (self.folder / witness.OWN).is_dir() else None
            beside = (path.parent for path in self.folder.absolute().parent.glob("*/config.yaml"))
            needed = {model for run in beside for model in models_of(run)}
            spare = [old for old in spare if old != best and old.resolve() not in needed]
        gone = [*spare, *(old for old in earlier if "+" in old.name)]
        # the state's index first: without it the others do not count
        self._drop([p for old in earlier if old not in gone for name in STATE_FILES if (p := old / name).exists()])
        self._drop(gone)
        return path

    @property
    def base(self) -> Path:
        """The model that the run's adapters are of, where no other folder has it."""
        return self.folder / "base"

    def keep_base(self, write: Callable[[Path], None]) -> None:
        """Writes it, once."""
        if not self.base.exists():
            self._put(self.base, write)

    def saved(self) -> list[Path]:
        """The checkpoints, oldest first."""
        there = self.checkpoints.iterdir() if self.checkpoints.is_dir() else ()
        found = [p for p in there if re.fullmatch(r"\d{6,}(\+\d+)?", p.name)]
        return sorted(found, key=lambda p: [int(part) for part in p.name.split("+")])

    def slim(self, weights: bool) -> None:
        """Drops the training state of a finished run that will not be resumed, and without `weights` every checkpoint."""
        saved = self.saved()
        state = [p for folder in saved for name in STATE_FILES if (p := folder / name).exists()]
        self._drop(state if weights else [*saved, *([self.base] if self.base.exists() else [])])

    def resumable(self) -> Path | None:
        """The newest checkpoint that training can resume from."""
        whole = [p for p in self.saved() if (p / STATE_FILES[0]).exists()]
        return whole[-1] if whole else None

    # --- evaluations ---

    def evaluation_path(self, done: int) -> Path:
        return self.evaluations_dir / f"{done:06d}.parquet"

    @property
    def ever_evaluated(self) -> bool:
        """Whether it was ever evaluated, though the file of it may be gone."""
        folder = f"{self.evaluations_dir.name}/"
        return any(name.startswith(folder) for name in self.manifest.files) or any(
            self.evaluations_dir.glob("*.parquet")
        )

    def write_evaluation(self, done: int, rows: Sequence[Row], result: dict[str, Any]) -> None:
        """What was sampled from the policy after `done` online batches on held-out prompts, and its means."""
        table = to_table(labelled(done, rows))
        table = table.replace_schema_metadata({"dualign": json.dumps({"step": done, "stats": result})})
        self._write_table(self.evaluation_path(done), table)

    def read_evaluation(self, done: int) -> tuple[tuple[Row, ...], dict[str, Any]]:
        path = self.evaluation_path(done)
        self.check(path, "Delete it and resume: its completions will be sampled, and their labels asked for, again")
        b = from_table(read_table(path), done)
        return b.rows, new_names(b.stats)

    @property
    def bytes(self) -> int:
        """What the folder takes on disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in folder.glob("*.parquet") if path.stem.isdigit())


def _told(steps: Sequence[int]) -> str:
    return f"{steps[0]} to {steps[-1]}" if steps else "none"
