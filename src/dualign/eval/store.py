"""Results as files beside the run, each with what made it: command, versions, judge, seed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError
from dualign.common.json_text import document, finite
from dualign.eval import cheat, ifeval, mtbench, rewards, winrate
from dualign.eval.outputs import is_run
from dualign.eval.result import Json, Result, Table

VERSIONED = ("dualign", "torch", "transformers", "numpy", "scipy", "openai")
OF_NUMBERS = {
    "winrate": winrate.tables, "alpaca": winrate.tables, "reward": rewards.tables, "cheat": cheat.tables,
    "mtbench": mtbench.tables, "ifeval": ifeval.tables,
}  # fmt: skip


def away(source: str | Path, result: Path) -> str | None:
    """Where the run `source` lies, seen from the folder of its result, so that both can be moved together; None for
    what is no run."""
    return os.path.relpath(Path(source).resolve(), result.parent.resolve()) if is_run(str(source)) else None


def provenance(kind: str, judge: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    """`judge`: the settings of the annotator, or None where nothing was judged."""
    versions = {}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    command = shlex.join(["dualign", *sys.argv[1:]])
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"kind": kind, "command": command, "made": made, "versions": versions, "judge": judge, "seed": seed}


def write(path: Path, result: Result) -> Result:
    """`path` gets the numbers, what made them and the tables; rows go, one a line, into the .jsonl of the same name.
    The result as it was written. Raises TypeError for what JSON does not know."""
    from dualign.common.durable import write_text

    tables = [replace(t, run=away(t.source, path)) if t.source and t.run is None else t for t in result.tables]
    result = replace(result, tables=tables, path=path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = document(result.json())
    lines = [json.dumps(finite(row), ensure_ascii=False) for row in result.rows]
    if lines:
        write_text(path.with_suffix(".jsonl"), "\n".join(lines) + "\n")
    write_text(path, text + "\n")
    return result


def read_all(run: Path) -> list[Result]:
    """Every result that is kept beside a run, by name; without rows. Raises UserError for a damaged one."""
    found = []
    for path in sorted((run / "eval").glob("*.json"), key=lambda p: p.stem):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(record, dict) and "kind" in record:
                found.append(_read(record, path))
        except (OSError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a readable result: {error!r}; delete it and evaluate again") from None
    return found


def _read(record: Json, path: Path) -> Result:
    """A result of an earlier version has no tables: they are made of its numbers. It may not say where its sources lie
    either; it was kept beside the first run that it names."""
    if "tables" in record:
        tables = [Table.of(table) for table in record["tables"]]
        return Result((), record["headline"], tables, record, path)
    run = path.resolve().parent.parent
    parts = record.get("systems", [record])
    if "run" not in parts[0]:
        ours = (part for part in parts if "source" in part and Path(part["source"]).resolve().name == run.name)
        if first := next(ours, None):
            first["run"] = ".."
    make = OF_NUMBERS.get(record["kind"])
    headline = str(record.get("headline") or record.get("verdict") or "")
    return Result((), headline, make(record) if make else [], record, path)
