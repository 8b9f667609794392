"""A run's folder where a model is asked for: its last checkpoint, `RUN@best` (by its witness) or `RUN@3`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dualign.common.errors import UserError
from dualign.common.paths import path_of
from dualign.config import Config, read
from dualign.run.folder import Run


def checkpoint_of(name: str) -> str:
    """The folder of the checkpoint that a run's name stands for; any other model's name as it is. Raises UserError where
    the run has no such checkpoint."""
    run, which = _parts(name)
    if run is None:
        return name
    if which not in ("latest", "best") and not which.isdecimal():
        raise UserError(f"{name}: expected {run}@best (by its witness), or {run}@N (after N online batches)")
    opened = Run.open(run)
    return str(opened.checkpoint(int(which) if which.isdecimal() else "best" if which == "best" else "latest"))


def _parts(name: str) -> tuple[Path | None, str]:
    """The run and what follows its @; (None, "") for the name of any other model."""
    whole = path_of(name)
    folder, sign, which = name.rpartition("@")
    for run, kind in ((whole, "latest"), (path_of(folder), which)) if sign else ((whole, "latest"),):
        if (run / "config.yaml").is_file() and (run / "run.json").is_file():
            return run, kind
    return None, ""


def pinned(config: Config) -> Config:
    """`config` with the checkpoint's folder in place of every run that it names as a model. A run that goes on gets
    newer ones: the run in `run.dir`, if there is one, keeps those that it began with."""
    m, then = config.model, _begun_with(Path(config.run.dir))
    found: dict[str, Any] = {"name": _kept(m.name, then.get("name"))}
    if m.reference:
        found["reference"] = _kept(m.reference, then.get("reference"))
    if all(getattr(m, key) == value for key, value in found.items()):
        return config
    return config.model_copy(update={"model": m.model_copy(update=found)})


def _begun_with(folder: Path) -> dict[str, Any]:
    """The section `model` of the run in `folder`, as it is written; empty where there is none. What else is in its
    configuration need not be right, or here."""
    stored = folder / "config.yaml"
    model = read(stored)[0].get("model") if stored.is_file() else None
    return model if isinstance(model, dict) else {}


def _kept(name: str, then: Any) -> str:
    run, which = _parts(name)
    if run is None:
        return name
    if (
        isinstance(then, str)
        and not which.isdecimal()
        and Path(then).resolve().parent == (run / "checkpoints").resolve()
    ):
        return then
    return checkpoint_of(name)
