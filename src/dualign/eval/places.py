"""Where results go: what was asked differently has a file of its own, by names that are the same every time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualign.config import load
from dualign.eval.asking import Asking
from dualign.eval.outputs import is_run


def place(
    kind: str,
    sources: Sequence[str],
    judge: str | None,
    asking: Asking,
    out: Path | None,
    against: str | None = None,
    second: str | None = None,
    own: Mapping[str, Any] | None = None,
) -> Path:
    """Where the result goes: one file for each judge, set of prompts, way of asking, opponent and code and settings of
    one's `own`, beside the first run. Makes its folder."""
    run = next((s for s in sources if is_run(s)), None)
    stem = "-".join(map(slug, filter(None, (kind, judge, asking.prompts))))
    if second:
        stem += f"-second-{slug(second)}"
    if against:
        stem += f"-against-{slug(against)}-{_six(whole(against))}"
    stem = named(stem, [judge, second], _unusual(asking, run) | ({"own": own} if own else {}))
    path = out or (Path(run) / "eval" if run else Path("eval")) / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def named(stem: str, judges: Sequence[str | None], asked: Mapping[str, Any]) -> str:
    """A result's name: `stem`, and where that does not say it all six hex digits of the judges' whole specs and of what
    was `asked` unlike the usual. A run's own reward and the built-in judges are told by their names."""
    specs = [whole(judge) for judge in judges if judge and judge != "run" and not judge.startswith("builtin:")]
    return f"{stem}-{_six(json.dumps([specs, asked], sort_keys=True))}" if specs or asked else stem


def slug(text: str) -> str:
    """A judge's spec, or a file, as part of a file's name."""
    name = re.sub(r"\W+", "-", Path(text).name.removeprefix("builtin:")).strip("-")
    return name if len(name) <= 40 else f"{name[:30]}-{_six(text)}"


def whole(text: str) -> str:
    """A file, folder or FILE.py:NAME by its whole path; anything else as it is."""
    file, sign, name = text.rpartition(":") if ".py:" in text else (text, "", "")
    try:
        return f"{Path(file).resolve()}{sign}{name}" if Path(file).exists() else text
    except (OSError, ValueError):  # an inline mapping is too long for a path
        return text


def _unusual(asking: Asking, run: str | None) -> dict[str, Any]:
    """What is asked unlike the usual: the run's own held-out prompts, and answers as long as its completions."""
    usual = asdict(Asking())
    config = load(Path(run) / "config.yaml") if run and asking.prompts else None
    if config:
        usual["max_new_tokens"] = config.rollout.max_new_tokens
        if config.data.eval and whole(config.data.eval) == whole(asking.prompts or ""):
            usual["prompts"] = asking.prompts
    found = {key: value for key, value in asdict(asking).items() if value != usual[key]}
    return found | ({"prompts": whole(asking.prompts)} if asking.prompts and "prompts" in found else {})


def _six(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
