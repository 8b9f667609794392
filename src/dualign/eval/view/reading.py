"""What a run's folder tells of the run: state, progress, settings, means, money. Every file is optional, and may be
half-written or damaged: then that is said, and the rest is shown."""

from __future__ import annotations

import json
import math
import re
import shutil
import sqlite3
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from dualign.eval.report.answers import Json
from dualign.eval.view.folders import Folders, stamp
from dualign.eval.view.metrics import OLD_NAMES, Metrics

RECENT = 900  # seconds: where locks cannot be seen, a run that was written to since is taken to be running
LARGEST = 4 << 20  # bytes of a JSON or YAML file that is read
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SECTION = re.compile(r"^(?=\w)", re.MULTILINE)  # of a configuration
LEAVES, DEPTH = 1000, 12  # of a configuration
SPARK = 48  # points of a run's small line


class Troubles(list[str]):
    """What could not be read, in words."""

    def read(self, name: str, read: Callable[[], Any]) -> Any:
        """What `read` returns; None, and a word about it, where the file is damaged."""
        try:
            return read()
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self.append(f"{name} is damaged or half-written: {lines[0][:200]}")
            return None


@dataclass
class Known:
    """What was read of one run, with the stamps of the files that it was read from."""

    stamps: Any = None
    told: Json = field(default_factory=dict)


class Reader:
    """Reads runs, and remembers what has not changed: a bounded number of them."""

    def __init__(self, folders: Folders, most: int = 2000) -> None:
        self.folders, self.most = folders, most
        self._known: OrderedDict[str, Known] = OrderedDict()

    def overview(self, name: str, folder: Path, held: set[int] | None) -> Json:
        """One row of the table of runs."""
        known = self._known.setdefault(name, Known())
        self._known.move_to_end(name)
        if len(self._known) > self.most:
            self._known.popitem(last=False)
        stamps = self._stamps(folder)
        if stamps != known.stamps:
            known.told, known.stamps = self._read(name, folder), stamps
        return known.told | {"state": self._state(folder, known.told, held, stamps)}

    def _stamps(self, folder: Path) -> Json:
        names = ("config.yaml", "run.json", "metrics.jsonl", "summary.json", "spent.sqlite", "spent.sqlite-wal")
        return {name: stamp(folder / name) for name in (*names, "evaluations", "batches")}

    def _read(self, name: str, folder: Path) -> Json:
        troubles = Troubles()
        settings = self.settings(folder, troubles)
        about = self.json(folder / "run.json", troubles) or {}
        summary = self.json(folder / "summary.json", troubles) or {}
        last, done = self._tail(folder / "metrics.jsonl")
        ends = [summary.get(when) for when in ("before", "after")]
        held = [e for e in ends if isinstance(e, dict)]
        return {
            "name": name,
            "system": _text(settings.get("algo.name")) or _text(summary.get("algo")),
            "settings": settings,
            "done": done,
            "total": settings.get("train.online_batches"),
            "finished": bool(summary),
            "begun": _text(about.get("begun")),
            "last": {key: last[key] for key in ("reward", "kl", "length", "absent", "labels", "loss") if key in last},
            "evaluated": max(self.steps(folder, "evaluations"), default=None),
            "held": [{OLD_NAMES.get(k, k): v for k, v in h.items() if _number(v)} for h in held],
            "gain": {key: summary.get(key) for key in ("gain", "gain_ci", "gain_sd", "gain_sd_ci", "n")}
            if "gain" in summary
            else None,
            "money": self.money(folder, troubles),
            "troubles": list(troubles),
        }

    def _state(self, folder: Path, told: Json, held: set[int] | None, stamps: Json) -> Json:
        """running, stopped (killed, or told to stop: it can be resumed) or finished; and when a file last changed."""
        written = max((s[2] / 1e9 for s in stamps.values() if s), default=0.0)
        lock = stamp(folder / ".lock")
        recent = not told["finished"] and time.time() - written < RECENT
        at_work = lock is not None and (lock[0] in held if held is not None else recent)
        state = "running" if at_work else "finished" if told["finished"] else "stopped"
        return {"is": state, "written": round(written)}

    # --- single files ---

    def json(self, path: Path, troubles: Troubles) -> Json | None:
        """None where there is none."""
        if (real := self.folders.file(path)) is None:
            return None

        def read() -> Json:
            found = json.loads(_bounded(real))
            if not isinstance(found, dict):
                raise ValueError("it holds no mapping")
            return found

        found: Json | None = troubles.read(path.name, read)
        return found

    def settings(self, folder: Path, troubles: Troubles) -> Json:
        """Every key of config.yaml by its path, as `algo.beta`."""
        text = self.config_text(folder)
        tree = troubles.read("config.yaml", lambda: _tree(text)) if text else None
        return _flat(tree) if isinstance(tree, dict) else {}

    def config_text(self, folder: Path) -> str:
        real = self.folders.file(folder / "config.yaml")
        try:
            return _bounded(real) if real else ""
        except (OSError, ValueError):
            return ""

    def _tail(self, path: Path) -> tuple[Json, int]:
        """The last record of metrics.jsonl and how many batches are done, without reading the whole of it."""
        if (real := self.folders.file(path)) is None:
            return {}, 0
        with open(real, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 65536))
            lines = file.read().split(b"\n")[:-1]
        for line in reversed(lines):
            try:
                record = json.loads(line)
                return {OLD_NAMES.get(k, k): v for k, v in record.items() if _number(v)}, int(record["step"]) + 1
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                continue
        return {}, 0

    def steps(self, folder: Path, kind: str) -> list[int]:
        """The numbers of the stored batches, or evaluations."""
        try:
            names = [path.name for path in (folder / kind).iterdir()]
        except OSError:
            return []
        return sorted(int(n[:-8]) for n in names if n.endswith(".parquet") and n[:-8].isdecimal() and n.isascii())

    def heldout(self, folder: Path, troubles: Troubles, ends: bool = False) -> list[Json]:
        """The means of each evaluation, or of the first and the last."""
        steps = self.steps(folder, "evaluations")
        found = []
        for step in steps[:1] + steps[-1:] * (len(steps) > 1) if ends else steps:
            path = folder / "evaluations" / f"{step:06d}.parquet"
            if (real := self.folders.file(path)) is None:
                continue
            stats = troubles.read(f"evaluations/{path.name}", partial(_stats, real, stamp(real)))
            if stats is not None:
                found.append(stats | {"batches": step})
        return found

    def money(self, folder: Path, troubles: Troubles) -> list[Json]:
        """What was bought, by model. The account is read from a copy: SQLite would write beside the original."""
        if self.folders.file(folder / "spent.sqlite") is None:
            return []

        def read() -> list[Json]:
            with tempfile.TemporaryDirectory(prefix="dualign-view-") as aside:
                for suffix in ("", "-wal"):
                    if (part := self.folders.file(folder / f"spent.sqlite{suffix}")) is not None:
                        shutil.copyfile(part, Path(aside) / f"spent.sqlite{suffix}")
                db = sqlite3.connect(Path(aside) / "spent.sqlite")
                try:
                    rows = db.execute(
                        "SELECT name, calls, prompt_tokens, completion_tokens, picodollars, held_picodollars FROM account"
                    ).fetchall()
                finally:
                    db.close()
            keys = ("model", "calls", "prompt_tokens", "completion_tokens")
            return [
                dict(zip(keys, row, strict=False)) | {"dollars": row[4] / 1e12, "held": row[5] / 1e12} for row in rows
            ]

        return troubles.read("spent.sqlite", read) or []

    def witnesses(self, folder: Path, troubles: Troubles) -> list[Json]:
        """Every look of each witness: mean over prompts, half its 95 % interval, and whether it spoke."""
        found = []
        for inner in sorted(folder.glob("witness*"), key=lambda p: p.name):
            if inner.name != "witness" and not inner.name.startswith("witness-"):
                continue
            looks = [look for path in inner.glob("*-*.json") if (look := self._look(path, troubles))]
            if looks:
                looks.sort(key=lambda look: (look["step"], look["kind"]))
                found.append({"folder": inner.name, "by": looks[0]["by"], "looks": looks})
        return found

    def _look(self, path: Path, troubles: Troubles) -> Json | None:
        import numpy as np

        from dualign.common.intervals import half_width, known

        told = self.json(path, troubles)
        if told is None:
            return None

        def read() -> Json:
            values = np.array([w for _, w in told["means"].values() if w is not None], float)
            half, test = half_width(values), told.get("test")
            return {
                "kind": told["kind"], "step": int(told["step"]), "by": str(told["by"]),
                "witness": float(values.mean()) if len(values) else None, "ci": half if known(half) else None,
                "spoke": bool(test and test["p"] <= test["level"]),
            }  # fmt: skip

        found: Json | None = troubles.read(f"{path.parent.name}/{path.name}", read)
        return found


def spark(metrics: Metrics) -> list[float]:
    """A run's reward (else loss) in few points: means of equal stretches."""
    column = metrics.columns.get("reward") or metrics.columns.get("loss")
    values = [v for v in column or () if not math.isnan(v)]
    if len(values) <= SPARK:
        return [float(f"{v:.4g}") for v in values]
    edges = [round(i * len(values) / SPARK) for i in range(SPARK + 1)]
    return [float(f"{sum(values[a:b]) / (b - a):.4g}") for a, b in pairwise(edges)]


@lru_cache(maxsize=4096)
def _stats(path: Path, version: Any) -> Json:
    """An evaluation's means; of several rewards also each one's (`NAME/mean`) with half its 95 % interval over prompts
    (`NAME/mean_ci`). `version`: of the file, which is read again when it changes."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        stats = json.loads(file.schema_arrow.metadata[b"dualign"])["stats"]
        found = {OLD_NAMES.get(key, key): value for key, value in stats.items() if _number(value)}
        if isinstance(means := stats.get("rewards"), dict):
            rows = file.read(["prompt_id", "parts"], use_threads=False).to_pylist()
            parts = [(row["prompt_id"], json.loads(row["parts"] or "{}")) for row in rows]
            for name, mean in means.items():
                half = _half_width([(prompt, each.get(name)) for prompt, each in parts])
                found |= {f"{name}/mean": mean, f"{name}/mean_ci": half}
    return found


def _half_width(values: list[tuple[str, float | None]]) -> float | None:
    """Half the 95 % interval of the mean over prompts; None where there is none."""
    from dualign.common.intervals import half_width, known

    by_prompt: dict[str, list[float]] = {}
    for prompt, value in values:
        if value is not None:
            by_prompt.setdefault(prompt, []).append(value)
    half = half_width([sum(each) / len(each) for each in by_prompt.values()])
    return half if known(half) else None


def _bounded(path: Path) -> str:
    with open(path, encoding="utf-8", errors="strict") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise ValueError("it is larger than such a file can be")
    return text


def _tree(text: str) -> Any:
    """A configuration, section by section, as most sections are those of the next run, too: YAML is slow to read."""
    try:
        parts = [_section(part) for part in SECTION.split(text)]
        return {key: value for part in parts if part for key, value in part.items()}
    except (yaml.YAMLError, AttributeError):  # not as a run writes it
        return yaml.load(text, Loader=LOADER)


@lru_cache(maxsize=2048)
def _section(text: str) -> Any:
    return yaml.load(text, Loader=LOADER)


def _flat(tree: Any) -> Json:
    """Leaves by their path; empty lists and mappings are leaves. Bounded, whatever aliases the file holds."""
    found: Json = {}
    left: list[tuple[str, Any]] = [("", tree)]
    while left and len(found) < LEAVES:
        path, value = left.pop()
        if value and isinstance(value, dict | list) and path.count(".") < DEPTH:
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{path}.{key}" if path else str(key), inner) for key, inner in items][:LEAVES][::-1]
        else:
            found[path] = value if _number(value) or value is None or isinstance(value, bool) else _text(value)
    return found


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any) -> str:
    return "" if value is None else str(value)[:400]
