"""The files of a run's folder: begun once, locked, written whole or not at all, and held to their hashes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

from dualign.common.code_digest import code_digest
from dualign.common.durable import durable, remove
from dualign.common.errors import UserError
from dualign.common.git import git_state
from dualign.common.yaml_text import parse_yaml
from dualign.run.journal import Journal
from dualign.run.manifest import Manifest, sha256_of

VERSIONED = ("dualign", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pyarrow")


GIT = {
    "git": Path(),
    "dualign_git": Path(__file__).parent,
}  # what the run was begun in; the package, if it is a checkout


class RunFiles:
    """What every kind of file of a run shares."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        self.folder = folder
        self.batches = folder / "batches"
        self.evaluations_dir = folder / "evaluations"
        self.checkpoints = folder / "checkpoints"
        self.witness_dir = folder / "witness"
        self.reused_dir = folder / "reused"
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
                f"run.dir: {folder} already holds a run; resume it by `dualign resume {folder}`, "
                "or choose another folder (run.dir=...)"
            )
        if folder.exists() and not (folder.is_dir() and self._is_stillborn()):
            raise UserError(f"run.dir: {folder} exists and is not empty; choose another folder (run.dir=...)")
        try:
            for part in (folder, self.batches, self.evaluations_dir, self.checkpoints):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: {folder} cannot be made: {error.strerror}") from None
        self.lock()
        versions = {}
        for name in VERSIONED:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        about: dict[str, Any] = {"format": 1, "begun": datetime.now().astimezone().isoformat(), "versions": versions}
        about |= {"code": code_digest(), "functions": list(functions), "inputs": inputs}
        about |= {"python": platform.python_version(), "platform": platform.platform()}
        about |= {key: state for key, place in GIT.items() if (state := git_state(place))}
        self.write_text("run.json", json.dumps(about, indent=1))
        self.write_text("config.yaml", config_text)  # last: with it, it is a run

    @property
    def about(self) -> dict[str, Any]:
        """How the run was begun: when, versions, the code's digest, the Python functions that were given as rewards,
        digests of its inputs; and what was fixed since."""
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
        parts = (self.batches, self.evaluations_dir, self.checkpoints)
        self.journal.end()
        inside = [path for part in parts if part.is_dir() for path in part.iterdir()]
        if any(path.is_dir() or path.stat().st_size for path in inside):
            return
        for path in inside:  # journals that nothing was written to
            path.unlink()
        for name in ("config.yaml", "run.json", "metrics.jsonl", "manifest", ".lock"):
            (self.folder / name).unlink(missing_ok=True)
        for made in (self.folder / "trackers", self.witness_dir):
            shutil.rmtree(made, ignore_errors=True)
        for part in (*parts, self.folder):
            with contextlib.suppress(OSError):  # not there, or something else is in it
                part.rmdir()

    # --- writing ---

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
        for folder in (
            self.folder,
            self.batches,
            self.evaluations_dir,
            self.checkpoints,
            self.witness_dir,
            self.reused_dir,
        ):
            for path in folder.glob(".*.partial"):
                remove(path)
        for folder, suffix in (
            (self.batches, "parquet"),
            (self.evaluations_dir, "parquet"),
            (self.witness_dir, "json"),
        ):
            for path in folder.glob("*.journal"):
                if (folder / f"{path.name.split('.')[0]}.{suffix}").exists():
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

    def check(self, path: Path, remedy: str) -> None:
        """Raises UserError, with what can be done, if a file is not what was written."""
        parts = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        for part in parts:
            if self.manifest.check(part) == "changed":
                raise UserError(f"{part}: damaged: it is not what was written (by its sha256). {remedy}")

    def write_text(self, name: str, text: str) -> None:
        self._put(self.folder / name, lambda aside: aside.write_text(text, encoding="utf-8"))


def models_of(folder: Path) -> list[Path]:
    """The folders of models that the run in `folder` is made from: of one that cannot be read, none."""
    try:
        model = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), str(folder))["model"]
        return [Path(name).resolve() for key in ("name", "reference") if (name := model.get(key))]
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return []
