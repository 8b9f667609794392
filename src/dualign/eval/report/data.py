"""What the page shows of a run, read from its folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from dualign.common.errors import UserError
from dualign.common.yaml_text import parse_yaml
from dualign.eval import store
from dualign.eval.report import answers
from dualign.eval.report.answers import answer, cut, prompt_text
from dualign.eval.result import Json, Result, Table
from dualign.run import witness
from dualign.run.folder import Run, read_table
from dualign.run.metrics import new_names
from dualign.run.witness import Witnessed
from dualign.training.heldout import kl_name

TEXT_BUDGET = 2_400_000  # characters of prompts and completions in one page, all runs together
LONGEST = 4000  # characters shown of one text
HISTOGRAMS = 60  # batches in the figure of weights


@dataclass(frozen=True)
class RunData:
    folder: Path
    name: str
    config_text: str
    metrics: list[Json]
    summary: Json
    heldout: list[Json]  # the means of each evaluation, by batches done
    answers: dict[int, list[Json]]  # held-out groups, by batches done
    batches: dict[int, list[Json]]  # groups of the training batches that the page holds
    batch_count: int
    weights: dict[int, np.ndarray]  # positive weights of some batches
    results: list[Result] = field(default_factory=list)  # kept beside it
    witnesses: list[Witnessed] = field(default_factory=list)  # its own, and those asked afterwards

    @cached_property
    def config(self) -> Json:
        """As it stands in the folder: a run of before lacks sections and keys."""
        tree = parse_yaml(self.config_text, str(self.folder / "config.yaml"))
        return tree if isinstance(tree, dict) else {}

    @property
    def sampling(self) -> Json:
        """Of training: temperature, top-p, the penalty for a missing EOS."""
        found: Json = self.config.get("rollout") or {}
        return found

    @property
    def eval_sampling(self) -> Json:
        temperature = (self.config.get("eval") or {}).get("temperature")
        return self.sampling if temperature is None else self.sampling | {"temperature": temperature}

    @cached_property
    def tables(self) -> list[Table]:
        """What evaluations measured of this run, wherever two folders have one name."""
        return [table for result in self.results for table in result.tables if table.is_about(self.folder)]

    @property
    def headlines(self) -> list[str]:
        """What the evaluations of this run say in a line."""
        ours = [r for r in self.results if not r.tables or any(table.is_about(self.folder) for table in r.tables)]
        return [f"{result.record['kind']}: {result.headline}" for result in ours if result.headline]


def heldout_kl_name(runs: Sequence[RunData]) -> str:
    """What the runs' distance to π_0 on held-out prompts is, where it is the same for all."""
    names = {kl_name(run.eval_sampling) for run in runs}
    return names.pop() if len(names) == 1 else kl_name({})


def collect(folders: Sequence[Path]) -> list[RunData]:
    """Raises UserError where a folder is no run or holds nothing yet."""
    names = _names(folders)
    runs = [_run(f, name, TEXT_BUDGET // len(folders)) for f, name in zip(folders, names, strict=True)]
    for folder, run in zip(folders, runs, strict=True):
        if not run.metrics and not run.heldout:
            raise UserError(f"{folder}: the run has no finished batch yet; nothing to report")
    return runs


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' last parts; whole paths where two share one."""
    last = [f.resolve().name for f in folders]
    return [name if last.count(name) == 1 else str(f) for f, name in zip(folders, last, strict=True)]


def _run(folder: Path, name: str, budget: int) -> RunData:
    run = Run.open(folder)
    steps, tables = run.steps(), {step: run.evaluation_path(step) for step in run.evaluated()}
    stats = {step: _stats(path) for step, path in tables.items()}
    sampled = {
        step: path for step, path in tables.items() if "data" not in stats[step]
    }  # else a fixed set's own answers
    return RunData(
        folder=folder,
        name=name,
        config_text=(folder / "config.yaml").read_text(encoding="utf-8"),
        metrics=run.metrics(),
        summary=run.summary or {},
        heldout=[{"batches": step, **stats[step]} for step in tables],
        answers=_within(sampled, budget // 3),
        batches=_within({step: run.batch_path(step) for step in steps}, budget - budget // 3),
        batch_count=len(steps),
        weights={step: _weights(run.batch_path(step)) for step in evenly(steps, HISTOGRAMS)},
        results=store.read_all(folder),
        witnesses=[found for path in witness.folders(folder) if (found := witness.read(path)).looks],
    )


def evenly(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of the items at equal distances, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, count).round().astype(int))]


def _stats(path: Path) -> Json:
    stats: Json = json.loads(pq.read_schema(path).metadata[b"dualign"])["stats"]
    return new_names(stats)


def _weights(path: Path) -> np.ndarray:
    if "algo.weight" not in pq.read_schema(path).names:
        return np.empty(0)
    values = pq.read_table(path, columns=["algo.weight"])["algo.weight"].drop_null().to_numpy()
    return values[values > 0]


def _within(paths: dict[int, Path], budget: int) -> dict[int, list[Json]]:
    """Groups by step: all files where their texts fit, else the first, the last and as many between them as do; of a
    file that is too long by itself, its first groups."""
    if not paths:
        return {}
    steps = list(paths)
    first = _groups(paths[steps[0]])
    size = max(1, sum(map(_size, first)))
    chosen = evenly(steps, max(2, budget // size))
    each = budget // len(chosen)
    return {step: _fit(first if step == steps[0] else _groups(paths[step]), each) for step in chosen}


def _fit(groups: list[Json], budget: int) -> list[Json]:
    ends = np.cumsum([_size(g) for g in groups])
    return groups[: max(1, int(np.searchsorted(ends, budget, "right")))]


def _size(group: Json) -> int:
    return len(group["prompt"]) + sum(len(a["text"]) + len(a.get("note", "")) + 120 for a in group["answers"])


def _groups(path: Path) -> list[Json]:
    """A batch's completions by prompt. Per-token columns are left out."""
    schema = pq.read_schema(path)
    flat = [n for n in schema.names if n.startswith("algo.") and not str(schema.field(n).type).startswith("list")]
    groups: dict[int, Json] = {}
    for row in read_table(path).select([*answers.COLUMNS, *flat]).to_pylist():
        group = groups.setdefault(
            row["group"],
            {"id": row["prompt_id"], "prompt": cut(prompt_text(row["prompt"]), LONGEST), "answers": []},
        )
        group["answers"].append(answer(row, LONGEST))
    return list(groups.values())
