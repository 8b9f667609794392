"""All runs under a folder: how far each is, what it takes on disk, and what may go."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from dualign.common.errors import UserError
from dualign.common.locks import locked
from dualign.common.yaml_text import parse_yaml
from dualign.run.files import models_of
from dualign.run.folder import STATE_FILES, Run

What = Literal["state", "checkpoints", "all"]
WHATS: dict[str, str] = {
    "state": "the training state of finished runs: they cannot be made longer any more",
    "checkpoints": "that, and the checkpoints of finished runs but the last and the best by the witness",
    "all": "whole runs",
}
OURS = ("config.yaml", "run.json", "metrics.jsonl", "summary.json", "manifest", ".lock", "model")  # at the top
MADE = ("trackers", "report", "eval")  # folders that commands fill beside the manifest
PARTS = ("batches", "evaluations")


@dataclass(frozen=True)
class Shelved:
    """A run in a list. `state`: running, finished, stopped (it can be resumed) or unreadable."""

    folder: Path
    state: Literal["running", "finished", "stopped", "unreadable"]
    system: str
    model: str
    done: int
    batches: int
    gain: float | None
    gain_ci: float | None
    begun: str | None
    bytes: int

    def record(self) -> dict[str, Any]:
        return vars(self) | {"folder": str(self.folder)}


def found(places: Iterable[Path]) -> list[Path]:
    """The runs at or under some places, each once; a run within a run is that run's. Raises UserError for a place that
    is not there."""
    runs: dict[Path, Path] = {}
    for place in places:
        if not place.is_dir():
            raise UserError(f"{place}: no such folder")
        for folder in _runs(place):
            runs.setdefault(folder.resolve(), folder)
    return list(runs.values())


def _runs(place: Path) -> Iterator[Path]:
    if (place / "config.yaml").is_file() and (place / "run.json").is_file():
        yield place
        return
    for inner in sorted(place.iterdir()):
        if inner.is_dir() and not inner.is_symlink() and not inner.name.startswith("."):
            yield from _runs(inner)


def shelved(folder: Path) -> Shelved:
    """A run's line in the list; of one that cannot be read what can be."""
    run, tree, state, summary, done = Run(folder), {}, "stopped", None, 0
    try:
        tree = parse_yaml((folder / "config.yaml").read_text(encoding="utf-8"), str(folder / "config.yaml"))
        summary, done = run.summary, len(run.metrics())
        total, system, model = tree["train"]["online_batches"], tree["algo"]["name"], tree["model"]["name"]
        state = "running" if running(folder) else "finished" if summary is not None else "stopped"
    except (UserError, OSError, ValueError, LookupError, TypeError):
        state, total, system, model, summary = "unreadable", 0, "?", "?", None
    gain = summary or {}
    return Shelved(folder, state, str(system), str(model), done, int(total), gain.get("gain"), gain.get("gain_ci"),  # type: ignore[arg-type]
                   run.about.get("begun"), size_of([folder]))  # fmt: skip


def running(folder: Path) -> bool:
    """Whether a process of this machine is at work on the run: it holds its lock."""
    lock = folder / ".lock"
    if not lock.exists():
        return False
    if (held := locked()) is not None:
        return lock.stat().st_ino in held
    try:
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def size_of(paths: Iterable[Path]) -> int:
    """Bytes on disk; links are not followed, and what a run at work takes away meanwhile is not counted."""
    total = 0
    for path in paths:
        inner = not path.is_symlink() and path.is_dir()
        for file in (Path(top, name) for top, _, names in os.walk(path) for name in names) if inner else (path,):
            with contextlib.suppress(FileNotFoundError):
                total += file.lstat().st_size
    return total


@dataclass(frozen=True)
class Plan:
    """What would go of a run, and what would stay as it is nobody's that we know. `why`: a reason to leave it alone."""

    folder: Path
    what: What
    paths: Sequence[Path] = ()
    foreign: Sequence[Path] = ()
    why: str | None = None

    @property
    def bytes(self) -> int:
        return size_of(self.paths)


def plans(folders: Sequence[Path], what: What) -> list[Plan]:
    """Of several runs. A checkpoint that another run is made from stays, unless that run goes as well."""
    made = [plan(folder, what) for folder in folders]
    beside = [p for folder in folders for p in folder.absolute().parent.iterdir() if (p / "config.yaml").is_file()]
    needs = {folder.resolve(): models_of(folder) for folder in (*folders, *beside)}
    while True:  # what stays may need what would go
        going = {each.folder.resolve() for each in made if what == "all" and each.why is None}
        needed = {model: run for run, models in needs.items() if run not in going for model in models}
        kept = [_without(each, needed) for each in made]
        if kept == made:
            return made
        made = kept


def _without(made: Plan, needed: Mapping[Path, Path]) -> Plan:
    """The plan without the models that other runs need."""
    own = made.folder.resolve()
    theirs = {model: run for model, run in needed.items() if own in model.parents and run != own}
    if made.what == "all" and theirs and made.why is None:
        return Plan(made.folder, made.what, why=f"{next(iter(theirs.values()))} is made from it")
    return replace(made, paths=[path for path in made.paths if path.resolve() not in theirs])


def plan(folder: Path, what: What) -> Plan:
    """Looks, and changes nothing. A run that is being worked on, a link to a run, and what is not finished (but for
    "all") stay."""
    run = Run(folder)
    if folder.is_symlink():
        return Plan(folder, what, why="a link")
    if running(folder):
        return Plan(folder, what, why="a process is working on it")
    try:
        if not {"config.yaml", "run.json"} <= run.manifest.files.keys():
            return Plan(folder, what, why="its manifest is missing, or it is no run of dualign's")
        if what == "all":
            ours, foreign = _sorted_out(run)
            return Plan(folder, what, ours, foreign)
        if run.summary is None:
            return Plan(folder, what, why="it is not finished, and needs it to be resumed")
        paths = [p for saved in run.saved() for name in STATE_FILES if (p := saved / name).exists()]
        if what == "checkpoints":
            best = run.best() if run.witness_dir.is_dir() else None
            spare = [saved for saved in run.saved()[:-1] if saved != best]
            paths = [*spare, *(p for p in paths if p.parent not in spare)]
    except (UserError, OSError, ValueError) as error:
        return Plan(folder, what, why=f"it cannot be read: {error}")
    return Plan(folder, what, paths)


def clean(planned: Plan) -> None:
    """Carries a plan out. Raises UserError where a process has begun to work on the run since."""
    run = Run(planned.folder)
    run.lock()
    try:
        if planned.what != "all":
            run._drop(planned.paths)
            return
        for path in (*planned.paths, run.folder / ".lock"):
            path.unlink(missing_ok=True)
        for folder, _, _ in os.walk(planned.folder, topdown=False):
            if not os.listdir(folder):
                os.rmdir(folder)
    finally:
        run.unlock()


def _sorted_out(run: Run) -> tuple[list[Path], list[Path]]:
    """Files that a run wrote, and others that lie in its folder."""
    ours: list[Path] = []
    foreign: list[Path] = []
    for path in sorted(p for p in run.folder.rglob("*") if p.is_symlink() or not p.is_dir()):
        name = path.relative_to(run.folder)
        top, last = name.parts[0], name.name
        mine = (
            name.as_posix() in run.manifest.files
            or (len(name.parts) == 1 and (top in OURS or fnmatch(top, "spent.sqlite*") or fnmatch(top, "server-*.log")))
            or (len(name.parts) > 1 and (top in MADE or top == "witness" or top.startswith("witness-")))
            or (top in PARTS and (last.endswith(".journal") or last.endswith(".partial")))
            or any(part.startswith(".") and part.endswith(".partial") for part in name.parts)
        )
        (ours if mine else foreign).append(path)
    return ours, foreign


def free_disk(place: Path) -> int:
    return shutil.disk_usage(place).free
