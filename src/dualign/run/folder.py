"""A run's folder. Nothing half-written is ever read: files are written aside, synced and renamed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dualign.common.code_digest import code_digest
from dualign.common.durable import durable, remove
from dualign.common.errors import UserError
from dualign.run.batch import Row, WeightedBatch, labelled
from dualign.run.journal import Journal, files_of
from dualign.run.manifest import Manifest, sha256_of
from dualign.run.table import from_table, read_table, to_table

STATE_FILES = ("state.json", "train.safetensors", "optimizer.safetensors")  # what only the newest checkpoint needs
VERSIONED = ("dualign", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pyarrow")


class Run:
    """runs/NAME: config.yaml, run.json, metrics.jsonl, batches/*.parquet, evaluations/*.parquet, checkpoints/*/,
    summary.json, and the manifest that holds their hashes."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.batches = folder / "batches"
        self.evaluations = folder / "evaluations"
        self.checkpoints = folder / "checkpoints"
        self.config_file = folder / "config.yaml"
        self.metrics_file = folder / "metrics.jsonl"
        self.journal = Journal(rank)
        self._lock: Any = None

    @cached_property
    def manifest(self) -> Manifest:
        return Manifest(self.folder)

    # --- opening ---

    def create(
        self, config_text: str, functions: Sequence[str] = (), inputs: Mapping[str, Mapping[str, str]] | None = None
    ) -> None:
        """Begins a fresh run in its folder. `functions`: the names of rewards that the configuration does not hold;
        `inputs`: digests of what it is made from (digests.of_run). Raises UserError if it holds another run or cannot be
        written."""
        folder = self.folder
        if self.config_file.exists():
            raise UserError(
                f"run.dir: {folder} already holds a run; go on with it by `dualign resume {folder}`, "
                "or choose another folder (run.dir=...)"
            )
        if folder.exists() and not (folder.is_dir() and self._is_stillborn()):
            raise UserError(f"run.dir: {folder} exists and is not empty; choose another folder (run.dir=...)")
        try:
            for part in (folder, self.batches, self.evaluations, self.checkpoints):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: {folder} cannot be made: {error.strerror}") from None
        self.lock()
        versions = {}
        for name in VERSIONED:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        about = {"format": 1, "begun": datetime.now().astimezone().isoformat(), "versions": versions}
        about |= {"code": code_digest(), "functions": list(functions), "inputs": inputs}
        self.write_text("run.json", json.dumps(about, indent=1))
        self.write_text("config.yaml", config_text)  # last: with it, it is a run

    @property
    def about(self) -> dict[str, Any]:
        """How the run was begun: when, versions, the code's digest, the Python functions that were given as rewards,
        digests of its inputs; and what was mended since."""
        try:
            found = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it holds nothing that training needs
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, **about: Any) -> None:
        """Adds to, or replaces, what is known of how the run was begun."""
        if self.about:
            self.write_text("run.json", json.dumps(self.about | about, indent=1))

    @property
    def begun(self) -> datetime | None:
        """When; None where run.json does not say."""
        try:
            return datetime.fromisoformat(self.about["begun"])
        except (KeyError, TypeError, ValueError):
            return None

    @property
    def functions(self) -> list[str] | None:
        """The names of those functions; None where run.json is lost."""
        names = self.about.get("functions")
        return [str(name) for name in names] if isinstance(names, list) else None

    @property
    def of_this_code(self) -> bool:
        """Whether the package has not changed since the run was begun."""
        return self.about.get("code") == code_digest()

    def _is_stillborn(self) -> bool:
        """Whether the folder holds nothing, or no more than `create` leaves when it is killed half-way."""
        ours = {"batches", "evaluations", "checkpoints", "run.json", "manifest", ".lock", "spent.sqlite"}
        return all(
            (p.name in ours or p.name.endswith(".partial")) and not (p.is_dir() and any(p.iterdir()))
            for p in self.folder.iterdir()
        )

    def abandon(self) -> None:
        """Takes back what `create` made, where nothing was sampled yet: an input that is wrong makes no run."""
        parts = (self.batches, self.evaluations, self.checkpoints)
        self.journal.end()
        inside = [path for part in parts if part.is_dir() for path in part.iterdir()]
        if any(path.is_dir() or path.stat().st_size for path in inside):
            return
        for path in inside:  # journals that nothing was written to
            path.unlink()
        for name in ("config.yaml", "run.json", "metrics.jsonl", "manifest", ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "trackers", ignore_errors=True)
        for part in (*parts, self.folder):
            with contextlib.suppress(OSError):  # not there, or something else is in it
                part.rmdir()

    @staticmethod
    def open(folder: Path) -> Run:
        """An existing run, to be read. Raises UserError where there is none."""
        run = Run(folder)
        if not run.config_file.is_file():
            raise UserError(f"{folder}: no run here (config.yaml is missing)")
        return run

    def lock(self) -> None:
        """One process at a time writes a run; the lock goes with the process, however it ends."""
        try:
            self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115  (held for the run's life)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.folder}: another process is working on this run") from None
        except OSError as error:
            raise UserError(f"{self.folder}: cannot be written: {error.strerror}") from None

    def unlock(self) -> None:
        self.journal.end()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def tidy(self) -> None:
        """Clears away what a kill left behind: files half written, journals of batches that are complete, and a last
        record whose file never came."""
        for folder in (self.folder, self.batches, self.evaluations, self.checkpoints):
            for path in folder.glob(".*.partial"):
                remove(path)
        for folder in (self.batches, self.evaluations):
            for path in folder.glob("*.journal"):
                if (folder / f"{path.name.split('.')[0]}.parquet").exists():
                    path.unlink()
        last = [self.folder / name for name in self.manifest.last if not self.manifest.files[name].gone]
        self.manifest.drop([path for path in last if not path.exists()])
        self.checkpoints.mkdir(exist_ok=True)
        recorded = [Path(name).parts for name, known in self.manifest.files.items() if not known.gone]
        checkpoints = sorted({self.checkpoints / parts[1] for parts in recorded if parts[0] == self.checkpoints.name})
        self.manifest.drop([path for path in checkpoints if not path.exists()])  # deleted by hand

    # --- files with hashes ---

    def _put(self, path: Path, write: Callable[[Path], Any]) -> None:
        def commit(aside: Path) -> None:
            parts = [p for p in aside.rglob("*") if p.is_file()] if aside.is_dir() else [aside]
            self.manifest.put({path / p.relative_to(aside): sha256_of(p) for p in parts})

        durable(path, write, commit)

    def _drop(self, paths: Sequence[Path]) -> None:
        """Removes files and folders; a folder loses its name first, so that none is ever seen half gone."""
        self.manifest.drop(paths)
        for path in paths:
            if path.is_dir():
                aside = path.with_name(f".{path.name}.partial")
                os.replace(path, aside)
                remove(aside)
            else:
                path.unlink(missing_ok=True)

    def check(self, path: Path, mend: str) -> None:
        """Raises UserError, with what can be done, if a file is not what was written."""
        parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        for part in parts:
            if self.manifest.check(part) == "changed":
                raise UserError(f"{part}: damaged: it is not what was written (by its sha256). {mend}")

    def write_text(self, name: str, text: str) -> None:
        self._put(self.folder / name, lambda aside: aside.write_text(text, encoding="utf-8"))

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

    # --- metrics ---

    def log(self, record: dict[str, Any]) -> None:
        """Adds one line, synced."""
        line = (json.dumps(record) + "\n").encode()
        self._metrics_sha.update(line)
        self.manifest.put({self.metrics_file: self._metrics_sha.hexdigest()})
        try:
            with open(self.metrics_file, "ab", buffering=0) as file:
                if file.write(line) != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(f"{self.metrics_file}: cannot be written: {error.strerror}. Make room and resume") from None

    @cached_property
    def _metrics_sha(self) -> Any:
        return hashlib.sha256(self.metrics_file.read_bytes() if self.metrics_file.exists() else b"")

    def metrics(self) -> list[dict[str, Any]]:
        """The records of finished batches. A line cut off by a kill is the last one, and its batch is replayed. Raises
        UserError for any other that cannot be read."""
        if not self.metrics_file.exists():
            return []
        *whole, _torn = self.metrics_file.read_bytes().split(b"\n")
        records = []
        for number, line in enumerate(whole, 1):
            try:
                records.append(json.loads(line))
            except ValueError:
                raise UserError(
                    f"{self.metrics_file}, line {number}: damaged. Delete the file: `dualign resume` "
                    "replays the stored batches and writes it again"
                ) from None
        return records

    def forget_metrics_from(self, step: int) -> None:
        """Drop the records of batches that are about to be replayed. Raises UserError if an earlier one is missing."""
        kept = [r for r in self.metrics() if r["step"] < step]
        if [r["step"] for r in kept] != list(range(step)):
            raise UserError(
                f"{self.metrics_file}: does not hold every batch before {step}. Delete it and {self.checkpoints}/* and "
                "resume: the stored batches are replayed from the first"
            )
        self.write_text("metrics.jsonl", "".join(json.dumps(r) + "\n" for r in kept))
        self.__dict__.pop("_metrics_sha", None)

    # --- checkpoints ---

    def save_checkpoint(self, step: int, update: int, write: Callable[[Path], None], keep_last: int | None) -> Path:
        """Checkpoint after `step` online batches and `update` updates of the next. Earlier ones keep their weights for
        evaluation (as many as `keep_last` says) but hand the training state on to this one."""
        path = self.checkpoints / (f"{step:06d}+{update}" if update else f"{step:06d}")
        if path == self.resumable():
            return path  # what would be written is there, to the last bit
        earlier = [old for old in self.saved() if old != path]
        if path.exists():
            self._drop([path])
        self._put(path, write)
        whole = [old for old in earlier if "+" not in old.name]
        spare = whole[: max(0, len(whole) + 1 - keep_last)] if keep_last else []
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
        """Drops the training state of a finished run that will not go on, and without `weights` every checkpoint."""
        saved = self.saved()
        state = [p for folder in saved for name in STATE_FILES if (p := folder / name).exists()]
        self._drop(state if weights else [*saved, *([self.base] if self.base.exists() else [])])

    def resumable(self) -> Path | None:
        """The newest checkpoint that training can go on from."""
        whole = [p for p in self.saved() if (p / STATE_FILES[0]).exists()]
        return whole[-1] if whole else None

    # --- evaluations ---

    def evaluation_path(self, done: int) -> Path:
        return self.evaluations / f"{done:06d}.parquet"

    @property
    def evaluated(self) -> bool:
        """Whether it was ever evaluated, though the file of it may be gone."""
        folder = f"{self.evaluations.name}/"
        return any(name.startswith(folder) for name in self.manifest.files) or any(self.evaluations.glob("*.parquet"))

    def write_evaluation(self, done: int, rows: Sequence[Row], result: dict[str, Any]) -> None:
        """What was sampled from the policy after `done` online batches on held-out prompts, and its means."""
        table = to_table(labelled(done, rows))
        table = table.replace_schema_metadata({"dualign": json.dumps({"step": done, "stats": result})})
        self._write_table(self.evaluation_path(done), table)

    def read_evaluation(self, done: int) -> tuple[tuple[Row, ...], dict[str, Any]]:
        path = self.evaluation_path(done)
        self.check(path, "Delete it and resume: its completions will be sampled, and their labels asked for, again")
        b = from_table(read_table(path), done)
        return b.rows, b.stats

    @property
    def bytes(self) -> int:
        """What the folder takes on disk."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())
