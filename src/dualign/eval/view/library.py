"""What the page asks for, answered from the runs' folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from dualign.common.locks import locked
from dualign.eval.report.answers import Json
from dualign.eval.view.folders import Folders
from dualign.eval.view.metrics import Metrics, points
from dualign.eval.view.reading import Reader, Troubles, spark

if TYPE_CHECKING:
    from dualign.eval.view.browser import Browser

HELD = 4_000_000  # numbers of metrics that are remembered
POINTS = 1200  # of a curve that are sent
SAME = ("run.dir",)  # settings by which runs are not told apart


class Library:
    def __init__(self, root: Path) -> None:
        self.folders = Folders(root)
        self.reader = Reader(self.folders)
        self._lock = threading.Lock()
        self._metrics: OrderedDict[Path, Metrics] = OrderedDict()

    @cached_property
    def browser(self) -> Browser:
        """Loaded when completions are first asked for: numpy and pyarrow cost as much as the rest of the start."""
        from dualign.eval.view.browser import Browser

        return Browser(self.reader)

    def runs(self) -> Json:
        """The table of runs: settings only where they differ. `version` changes when any of it does."""
        found, held = self.folders.runs(), locked()
        with self._lock:
            rows = [self.reader.overview(name, folder, held) for name, folder in found.items()]
        keys = dict.fromkeys(key for row in rows for key in row["settings"])
        differing = [
            key for key in keys
            if key not in SAME and len({json.dumps(row["settings"].get(key)) for row in rows if row["settings"]}) > 1
        ]  # fmt: skip
        rows = [row | {"settings": {k: row["settings"].get(k) for k in differing}} for row in rows]
        told = {"root": self.folders.root.name, "runs": rows, "differing": differing, "locks": held is not None}
        return told | {"version": hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]}

    def more(self) -> Json:
        """What the table shows once it stands: each run's reward in a few points, and of a run that is not finished the
        means of its first and last evaluation."""
        told = {}
        for name, folder in self.folders.runs().items():
            troubles = Troubles()
            there = (folder / "summary.json").exists()
            held = [] if there else self.reader.heldout(folder, troubles, ends=True)
            told[name] = {"spark": spark(self._read_metrics(folder)[0]), "held": held, "troubles": troubles}
        return told

    def run(self, name: str) -> Json:
        """One run's settings, evaluations, witnesses, and what of it cannot be read."""
        folder, troubles = self.folders.run(name), Troubles()
        settings = self.reader.settings(folder, troubles)
        return {
            "name": name,
            "settings": settings,
            "config": self.reader.config_text(folder)[:100_000],
            "about": self.reader.json(folder / "run.json", troubles) or {},
            "summary": self.reader.json(folder / "summary.json", troubles) or {},
            "heldout": self.reader.heldout(folder, troubles),
            "witnesses": self.reader.witnesses(folder, troubles),
            "money": self.reader.money(folder, troubles),
            "batches": self.reader.steps(folder, "batches"),
            "evaluations": self.reader.steps(folder, "evaluations"),
            "troubles": list(troubles),
        }

    def curves(self, name: str, low: float, high: float, most: int) -> Json:
        """Every number of metrics.jsonl as a curve over batches, from `low` to `high`, thinned to about `most` points.
        `before`: labels and hours that were spent when the batches in `steps` began."""
        metrics, damaged = self._read_metrics(self.folders.run(name))
        with self._lock:
            columns = dict(metrics.columns)
            step = columns.pop("step", None)
            if step is None:
                return {"name": name, "curves": {}, "done": 0, "damaged": damaged}
            phases = [columns[key] for key in columns if key.startswith("seconds/")]
            seconds = [sum(s for s in each if s == s) for each in zip(*phases, strict=True)] or [0.0] * len(step)
            hours = [total / 3600 for total in accumulate(seconds)]
            spent = {"hours": hours, "labels": columns.get("labels", [0.0] * len(step))}
            curves = {key: points(step, y, low, high, most) for key, y in columns.items()}
            where = {s: i for i, s in enumerate(step)}
            at = sorted({i for x, _ in curves.values() for i in x})
            before = {
                key: [round(float(y[where[s] - 1]), 5) if where[s] else 0.0 for s in at] for key, y in spent.items()
            }
            total = {key: float(y[-1]) if len(y) else 0.0 for key, y in spent.items()}
            told = {"name": name, "done": len(step), "damaged": damaged, "curves": curves}
            return told | {"steps": at, "before": before, "total": total}

    def _read_metrics(self, folder: Path) -> tuple[Metrics, list[int]]:
        path = self.folders.file(folder / "metrics.jsonl")
        with self._lock:
            if path is None:
                return Metrics(folder / "metrics.jsonl"), []
            metrics = self._metrics.setdefault(path, Metrics(path))
            self._metrics.move_to_end(path)
            metrics.update()
            while len(self._metrics) > 1 and sum(m.size for m in self._metrics.values()) > HELD:
                self._metrics.popitem(last=False)
            return metrics, metrics.damaged[:20]
