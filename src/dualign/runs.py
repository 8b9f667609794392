"""A run's folder. Nothing half-written is ever read: files are written aside, synced and renamed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dualign.batch import Row, WeightedBatch, labelled
from dualign.errors import UserError
from dualign.types import Label, Prompt, Rollout

STATE_FILES = ("state.json", "train.safetensors", "optimizer.safetensors")  # what only the newest checkpoint needs
VERSIONED = ("dualign", "torch", "transformers", "accelerate", "datasets", "peft", "numpy", "pyarrow")


def durable(path: Path, write: Callable[[Path], Any]) -> None:
    """Makes `path` (file or folder) appear complete or not at all, even through a power cut."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        _remove(aside)
        write(aside)
        for item in [aside, *(aside.rglob("*") if aside.is_dir() else ())]:
            _sync(item)
        if path.is_dir():
            _remove(path)
        os.replace(aside, path)
        _sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            _remove(aside)
        raise UserError(
            f"{path}: cannot be written: {error.strerror or error}. What was written before is kept; "
            "make room (or mend the folder's permissions) and resume"
        ) from None


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    durable(path, lambda aside: aside.write_text(text, encoding="utf-8"))


class Run:
    """runs/NAME: config.yaml, run.json, metrics.jsonl, batches/*.parquet, evaluations/*.parquet, checkpoints/*/, summary.json."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.batches = folder / "batches"
        self.evaluations = folder / "evaluations"
        self.checkpoints = folder / "checkpoints"
        self._lock: Any = None

    # --- opening ---

    @staticmethod
    def create(folder: Path, config_text: str) -> Run:
        """A fresh run. Raises UserError if the folder holds another run or cannot be written."""
        run = Run(folder)
        if (folder / "config.yaml").exists():
            raise UserError(
                f"run.dir: {folder} already holds a run; go on with it by `dualign resume {folder}`, "
                "or choose another folder (run.dir=...)"
            )
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"run.dir: {folder} exists and is not empty; choose another folder (run.dir=...)")
        try:
            for part in (folder, run.batches, run.evaluations, run.checkpoints):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"run.dir: {folder} cannot be made: {error.strerror}") from None
        run.lock()
        versions = {}
        for name in VERSIONED:
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        write_text(folder / "run.json", json.dumps({"format": 1, "versions": versions}, indent=1))
        write_text(folder / "config.yaml", config_text)
        return run

    @staticmethod
    def open(folder: Path) -> Run:
        """An existing run, to be read. Raises UserError where there is none."""
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: no run here (config.yaml is missing)")
        return Run(folder)

    def lock(self) -> None:
        """One process at a time writes a run; the lock goes with the process, however it ends."""
        self._lock = open(self.folder / ".lock", "a")  # noqa: SIM115  (held for the run's life)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{self.folder}: another process is working on this run") from None

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    # --- online batches ---

    def batch_path(self, step: int) -> Path:
        return self.batches / f"{step:06d}.parquet"

    def write_batch(self, b: WeightedBatch) -> None:
        """The whole batch, durable before the first update that uses it."""
        table = to_table(b)
        durable(self.batch_path(b.step), lambda aside: pq.write_table(table, aside, compression="zstd"))

    def read_batch(self, step: int) -> WeightedBatch | None:
        """The batch as it was written, or None if it was not."""
        path = self.batch_path(step)
        return from_table(read_table(path), step) if path.exists() else None

    # --- metrics ---

    def log(self, record: dict[str, Any]) -> None:
        with open(self.folder / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        return list(self._records())

    def _records(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        if not path.exists():
            return
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return  # a line cut off by a kill is the last one, and its batch is replayed

    def forget_metrics_from(self, step: int) -> None:
        """Drop the records of batches that are about to be replayed."""
        kept = [json.dumps(r) + "\n" for r in self._records() if r["step"] < step]
        write_text(self.folder / "metrics.jsonl", "".join(kept))

    # --- checkpoints ---

    def save_checkpoint(self, step: int, update: int, write: Callable[[Path], None], keep_last: int | None) -> Path:
        """Checkpoint after `step` online batches and `update` updates of the next. Earlier ones keep their weights for
        evaluation (as many as `keep_last` says) but hand the training state on to this one."""
        path = self.checkpoints / (f"{step:06d}+{update}" if update else f"{step:06d}")
        earlier = [old for old in self.saved() if old != path]
        durable(path, write)
        for old in earlier:
            for name in STATE_FILES:
                (old / name).unlink(missing_ok=True)
        whole = [old for old in earlier if "+" not in old.name]
        spare = whole[: len(whole) + 1 - keep_last] if keep_last else []
        for old in [*spare, *(old for old in earlier if "+" in old.name)]:
            _remove(old)
        return path

    def saved(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(p for p in self.checkpoints.iterdir() if p.name[0].isdigit())

    def resumable(self) -> Path | None:
        """The newest checkpoint that training can go on from."""
        whole = [p for p in self.saved() if (p / STATE_FILES[0]).exists()]
        return whole[-1] if whole else None

    # --- evaluations ---

    def write_evaluation(self, done: int, rows: Sequence[Row], result: dict[str, Any]) -> None:
        """What was sampled from the policy after `done` online batches on held-out prompts, and its means."""
        table = to_table(labelled(done, rows))
        table = table.replace_schema_metadata({"dualign": json.dumps({"step": done, "stats": result})})
        durable(self.evaluations / f"{done:06d}.parquet", lambda aside: pq.write_table(table, aside, compression="zstd"))

    def read_evaluation(self, done: int) -> tuple[tuple[Row, ...], dict[str, Any]]:
        b = from_table(read_table(self.evaluations / f"{done:06d}.parquet"), done)
        return b.rows, b.stats


# --- the weighted batch as a table ---

_TOKEN_COLUMNS = {"logp_old_NT": "logp_old", "logp_ref_NT": "logp_ref", "value_old_NT": "value_old"}


def read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged: {str(error).splitlines()[0]}") from None


def to_table(b: WeightedBatch) -> pa.Table:
    """One row per completion. Per-token columns are lists; what a row without a label has no value for is null."""
    rollouts, labels = [r.rollout for r in b.rows], [r.label for r in b.rows]
    columns: dict[str, pa.Array] = {
        "index": pa.array([r.index for r in rollouts], pa.int32()),
        "group": pa.array([r.group for r in rollouts], pa.int32()),
        "prompt_id": pa.array([r.prompt.id for r in rollouts]),
        "prompt": pa.array([_prompt_text(r.prompt) for r in rollouts]),
        "columns": pa.array([json.dumps(dict(r.prompt.columns), default=str) for r in rollouts]),
        "completion": pa.array([r.text for r in rollouts]),
        "finish": pa.array([r.finish for r in rollouts]),
        "prompt_ids": pa.array([list(r.prompt_ids) for r in rollouts], pa.list_(pa.int32())),
        "completion_ids": pa.array([list(r.completion_ids) for r in rollouts], pa.list_(pa.int32())),
        "sampler_logp": pa.array([list(r.sampler_logp) for r in rollouts], pa.list_(pa.float32())),
        "reward": pa.array([v.value for v in labels], pa.float64()),
        "absent": pa.array([v.reason for v in labels], pa.string()),
        "note": pa.array([v.note for v in labels], pa.string()),
        "parts": pa.array([json.dumps(dict(v.parts)) for v in labels]),
    }
    present = [i for i, v in enumerate(labels) if v.value is not None]
    for name, column in _TOKEN_COLUMNS.items():
        value = getattr(b.batch, name)
        if value is not None:
            columns[column] = _spread(value, b, present)
    for name, value in b.batch.columns.items():
        columns[f"algo.{name}"] = _spread(value, b, present)
    table = pa.table(columns)
    return table.replace_schema_metadata({"dualign": json.dumps({"step": b.step, "stats": b.stats})})


def _spread(value: Tensor, b: WeightedBatch, present: list[int]) -> pa.Array:
    """(N,) or (N, T) of the present rows -> one entry per row, tokens without padding."""
    out: list[Any] = [None] * len(b.rows)
    for i, row in enumerate(present):
        entry = value[i]
        out[row] = entry[: len(b.tokens.completion_ids[i])].tolist() if entry.dim() else entry.item()
    kind = pa.bool_() if value.dtype == torch.bool else pa.float32() if value.is_floating_point() else pa.int64()
    return pa.array(out, pa.list_(kind) if value.dim() > 1 else kind)


def from_table(table: pa.Table, step: int) -> WeightedBatch:
    """The inverse of to_table, bit for bit."""
    data = {name: table[name].to_pylist() for name in table.column_names}
    rows = tuple(
        Row(
            Rollout(
                index=data["index"][i],
                group=data["group"][i],
                prompt=_prompt(data["prompt_id"][i], data["prompt"][i], data["columns"][i]),
                prompt_ids=tuple(data["prompt_ids"][i]),
                completion_ids=tuple(data["completion_ids"][i]),
                text=data["completion"][i],
                finish=data["finish"][i],
                sampler_logp=tuple(data["sampler_logp"][i]),
            ),
            Label(data["reward"][i], data["absent"][i], json.loads(data["parts"][i]), data["note"][i]),
        )
        for i in range(table.num_rows)
    )
    b = labelled(step, rows)
    present = [i for i, row in enumerate(rows) if row.label.value is not None]
    kinds = {f.name: f.type for f in table.schema}

    def gather(name: str) -> Tensor:
        values = [data[name][i] for i in present]
        kind = kinds[name].value_type if pa.types.is_list(kinds[name]) else kinds[name]
        dtype = torch.bool if pa.types.is_boolean(kind) else torch.float32 if pa.types.is_floating(kind) else torch.long
        if not pa.types.is_list(kinds[name]):
            return torch.tensor(values, dtype=dtype)
        out = torch.zeros(len(values), b.tokens.width, dtype=dtype)
        for i, v in enumerate(values):
            out[i, : len(v)] = torch.tensor(v, dtype=dtype)
        return out

    tokens = {field: gather(column) for field, column in _TOKEN_COLUMNS.items() if column in data}
    algo = {name.removeprefix("algo."): gather(name) for name in data if name.startswith("algo.")}
    about = json.loads(table.schema.metadata[b"dualign"])
    batch = replace(b.batch, reward_N=b.batch.reward_N.float(), **tokens, columns=algo)
    return replace(b, batch=batch, stats=about["stats"])


def _prompt_text(prompt: Prompt) -> str:
    return json.dumps(prompt.messages if prompt.conversational else prompt.content, ensure_ascii=False)


def _prompt(id: str, content: str, columns: str) -> Prompt:
    parsed = json.loads(content)
    return Prompt(id, parsed if isinstance(parsed, str) else tuple(parsed), json.loads(columns))
