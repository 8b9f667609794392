"""`dualign verify`: whether a run's folder holds what was written to it, and what to do where it does not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dualign import config as configs
from dualign.annotate.endpoints import SPENT
from dualign.common import lines
from dualign.common.errors import UserError
from dualign.run import digests
from dualign.run.folder import Run
from dualign.run.metrics import batch_record
from dualign.run.table import from_table, read_table

AGAIN = "Delete it and resume: what it held is made again (labels that are in no other file are asked for again)"
REPLAY = "Delete it and checkpoints/* and resume: the stored batches are replayed from the first, without a label"


@dataclass(frozen=True)
class Finding:
    """`damaged`: a file is not what was written. `changed`: what the run was made from is not what it was.
    `unfinished`: what a stop or a kill leaves; resume continues from it."""

    kind: Literal["damaged", "changed", "unfinished"]
    text: str
    remedy: str = "`dualign resume` continues from here"


def verify(folder: Path) -> list[Finding]:
    """Everything that is to be said about a run's folder. Raises UserError where there is no run. Writes nothing."""
    run = Run.open(folder)
    try:
        _ = run.manifest
    except UserError as error:
        remedy = "Delete that line, and verify again: files without a record will be named"
        return [Finding("damaged", str(error), remedy)]
    if not run.manifest.files:
        return [Finding("damaged", f"{run.manifest.path}: missing", "Nothing can be checked without it")]
    found = [*_recorded(run), *_present(run)]
    spoilt = {finding.text.partition(":")[0] for finding in found if finding.kind == "damaged"}
    return [*found, *_batches_and_metrics(run, lambda path: str(path) in spoilt), *_inputs(run)]


def _inputs(run: Run) -> Iterator[Finding]:
    """What the run was made from, as far as it is here and its digest is known."""
    then = run.about.get("inputs")
    try:
        config = configs.load(run.config_file)
    except UserError:  # damaged, and named as such
        return
    if not isinstance(then, dict):
        return
    for key, now in digests.of_run(config, near=True).items():
        if words := digests.changed(then.get(key) or {}, now):
            remedy = "The run was made with what was there before: put it back to resume it, or to compare it with π_0"
            yield Finding("changed", f"{key}: {words}", remedy)


def _recorded(run: Run) -> Iterator[Finding]:
    """Every file that has a record."""
    for name, known in run.manifest.files.items():
        path = run.folder / name
        if known.gone:
            if path.exists():
                yield Finding("unfinished", f"{path}: was about to be removed")
            continue
        state = run.manifest.check(path)
        if state == "missing" and name in run.manifest.last:
            yield Finding("unfinished", f"{path}: was about to be written")
        elif state == "missing":
            yield Finding("damaged", f"{path}: missing", _remedy(run, path))
        elif state == "changed" and path == run.metrics_file:
            yield _metrics_end(run, known.sha256)
        elif state == "changed":
            yield Finding("damaged", f"{path}: not what was written (its sha256 differs)", _remedy(run, path))


def _metrics_end(run: Run, hashes: list[str]) -> Finding:
    whole, newline, torn = run.metrics_file.read_bytes().rpartition(b"\n")
    if torn and hashlib.sha256(whole + newline).hexdigest() in hashes:
        return Finding("unfinished", f"{run.metrics_file}: its last line is cut off")
    return Finding("damaged", f"{run.metrics_file}: not what was written (its sha256 differs)", REPLAY)


def _remedy(run: Run, path: Path) -> str:
    if run.checkpoints in path.parents:
        checkpoint = run.checkpoints / path.relative_to(run.checkpoints).parts[0]
        return f"Delete {checkpoint} and resume: training resumes from an earlier state by the stored batches"
    if run.base in path.parents:
        return f"Delete {run.base} and resume: it is written again with the next checkpoint"
    if path == run.config_file:
        return "Put it back as it was (any earlier copy); changes are made by overrides: dualign resume RUN key=value"
    if path == run.metrics_file or path.parent == run.reused_dir:
        return REPLAY
    if path.parent in (run.batches, run.evaluations_dir):
        return _again(run, path)
    if path.name == "run.json":
        return "It says what the run began with: without it nobody can tell whether model, data or rewards have changed"
    return "Delete it and resume: it is written again"


def _again(run: Run, path: Path) -> str:
    found = run.resumable()
    if found and path.stem.isdigit() and path.stem < found.name:  # "000002" < "000002+1": in the midst of its updates
        return f"Training is past it ({found}). To make it again, delete it and checkpoints/*, and resume"
    return AGAIN


def _present(run: Run) -> Iterator[Finding]:
    """Files that are there without a record, and what is in progress."""
    for part in (run.folder, run.batches, run.evaluations_dir, run.checkpoints, run.witness_dir, run.reused_dir):
        for path in sorted(part.iterdir()) if part.is_dir() else []:
            if path.name.endswith(".partial"):
                yield Finding("unfinished", f"{path}: half written when the run was killed")
            elif path.suffix == ".journal":
                yield _journal(path)
            elif part != run.folder and not path.name.startswith(SPENT):  # an account changes with each label
                for file in [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]:
                    if file.relative_to(run.folder).as_posix() not in run.manifest.files:
                        yield Finding("damaged", f"{file}: not of this run (it has no record)", "Move it elsewhere")


def _journal(path: Path) -> Finding:
    try:
        records, _ = lines.read(path)
    except UserError as error:
        return Finding("damaged", str(error), AGAIN)
    labels = sum(len(r.get("labels", ())) for r in records)
    completions = sum("index" in r for r in records)
    return Finding("unfinished", f"{path}: a batch in progress, {completions} completions and {labels} labels so far")


def _batches_and_metrics(run: Run, spoilt: Callable[[Path], bool]) -> Iterator[Finding]:
    steps = sorted(int(p.stem) for p in run.batches.glob("*.parquet"))
    same = not spoilt(run.folder / "run.json") and run.of_this_code  # another version may have measured otherwise
    try:
        records = run.metrics()
    except UserError as error:
        yield Finding("damaged", str(error), REPLAY)
        return
    for at, record in enumerate(records):
        if not isinstance(record, dict) or record.get("step") != at:
            yield Finding("damaged", f"{run.metrics_file}, line {at + 1}: not of online batch {at}", REPLAY)
            return
        if same and at in steps and not spoilt(run.batch_path(at)):
            yield from _against(run, at, record)
    for missing in sorted(set(range(max([*steps, len(records) - 1], default=-1))) - set(steps)):
        path = run.batch_path(missing)
        if path.relative_to(run.folder).as_posix() not in run.manifest.files:  # else it is named already
            yield Finding("damaged", f"{path}: missing, though what follows it is there", _again(run, path))
    found = run.resumable()
    if found and len(records) < int(found.name.split("+")[0]):
        yield Finding("damaged", f"{run.metrics_file}: ends at {len(records)} batches, before {found}", REPLAY)
    elif len(steps) > len(records):
        yield Finding("unfinished", f"online batch {len(records)} is stored, its updates are not finished")
    for path in run.evaluations_dir.glob("*.parquet"):
        if not spoilt(path):
            yield from _readable(path)
    if not (run.folder / "summary.json").exists():
        yield Finding("unfinished", f"{len(records)} online batches are finished, the run is not")


def _against(run: Run, step: int, record: dict[str, Any]) -> Iterator[Finding]:
    """A batch's file against its line of metrics."""
    path = run.batch_path(step)
    try:
        told = json.loads(json.dumps(batch_record(from_table(read_table(path), step), [], "reward" in record)))
    except (UserError, KeyError, ValueError, TypeError) as error:
        yield Finding("damaged", f"{path}: cannot be read as a batch: {error}", AGAIN)
        return
    for key, value in told.items():
        kept = record.get(key)
        if kept != value and not (value != value and kept != kept):
            text = f"{path}: {key} is {value} here and {kept} in metrics.jsonl"
            yield Finding("damaged", text, f"If the batch's sha256 is right, {run.metrics_file} is not. {REPLAY}")


def _readable(path: Path) -> Iterator[Finding]:
    try:
        read_table(path)
    except UserError as error:
        yield Finding("damaged", str(error), AGAIN)
