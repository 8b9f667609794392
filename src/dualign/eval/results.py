"""Results as files beside the run, each with what made it: command, versions, judge, seed."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError

VERSIONED = ("dualign", "torch", "transformers", "numpy", "scipy", "openai")


def away(source: str | Path, result: Path) -> str | None:
    """Where the run `source` lies, seen from the folder of its result, so that both can be moved together; None for what
    is no run."""
    from dualign.eval.outputs import is_run

    return os.path.relpath(Path(source).resolve(), result.parent.resolve()) if is_run(str(source)) else None


def system_of(result: Mapping[str, Any], run: Path) -> dict[str, Any] | None:
    """The part of a result in RUN/eval that is about that run: by where its source lies, never by its name alone. A
    result of an earlier version does not say; it was kept beside the first run that it names."""
    for system in result.get("systems", [result]):
        if "run" in system:
            if system["run"] is not None and (run / "eval" / system["run"]).resolve() == run.resolve():
                return dict(system)
        elif "source" not in system or Path(system["source"]).resolve().name == run.resolve().name:
            return dict(system)
    return None


def provenance(kind: str, judge: Mapping[str, Any] | None, seed: int) -> dict[str, Any]:
    """`judge`: the settings of the annotator, or None where nothing was judged."""
    versions = {}
    for name in VERSIONED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    command = shlex.join(["dualign", *sys.argv[1:]])
    made = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {"kind": kind, "command": command, "made": made, "versions": versions, "judge": judge, "seed": seed}


def write(path: Path, result: Mapping[str, Any], rows: Iterable[Mapping[str, Any]] = ()) -> None:
    """`path` gets the numbers; what they were computed from goes, a row a line, into the .jsonl of the same name."""
    from dualign.common.durable import write_text

    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(finite(row), ensure_ascii=False) for row in rows]
    if lines:
        write_text(path.with_suffix(".jsonl"), "\n".join(lines) + "\n")
    write_text(path, json.dumps(finite(result), indent=1, ensure_ascii=False) + "\n")


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every result beside a run, by name. Raises UserError for a damaged one."""
    found = []
    for path in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: not a readable result: {error}; delete it and evaluate again") from None
        if isinstance(result, dict) and "kind" in result:
            found.append({"name": path.stem, **result})
    return found


def finite(value: Any) -> Any:
    """JSON knows no nan or infinity: null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
