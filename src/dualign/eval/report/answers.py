"""A completion as a page shows it: its text, its label, and what the system made of it. Reads rows, imports no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]

COLUMNS = ("group", "prompt_id", "prompt", "completion", "finish", "reward", "absent", "note", "parts")
WEIGHTS = {"algo.weight": "weight", "algo.advantage": "advantage", "algo.log_w_reg": "pull", "algo.log_w_adv": "push"}


def messages(text: str) -> list[Json]:
    """A stored prompt's turns; plain text is one without a role."""
    content = json.loads(text)
    turns = [{"content": content}] if isinstance(content, str) else content
    return [{"role": turn.get("role", ""), "content": _words(turn)} for turn in turns]


def _words(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    said = content if isinstance(content, str) else "" if content is None else json.dumps(content, ensure_ascii=False)
    calls = turn.get("tool_calls")
    return "\n".join([*([said] if said else []), *([json.dumps(calls, ensure_ascii=False)] if calls else [])])


def prompt_text(text: str) -> str:
    """All of a stored prompt in one text."""
    turns = messages(text)
    if len(turns) == 1:
        return str(turns[0]["content"])
    return "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def answer(row: Mapping[str, Any], longest: float) -> Json:
    """Only what there is: a page of ten thousand answers is mostly keys."""
    found: Json = {"text": cut(row["completion"], longest), "reward": rounded(row.get("reward"))}
    if row.get("finish") == "length":
        found["cut"] = True
    for key in ("absent", "note"):
        if row.get(key):
            found[key] = cut(row[key], longest)
    parts = json.loads(row.get("parts") or "{}")
    if len(parts) > 1:
        found["parts"] = {name: rounded(value) for name, value in parts.items()}
    found |= {short: rounded(row[name]) for name, short in WEIGHTS.items() if row.get(name) is not None}
    if row.get("algo.clipped"):
        found["clipped"] = True
    return found


def rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def cut(text: str, longest: float) -> str:
    return text if len(text) <= longest else f"{text[: int(longest)]} … ({len(text) - longest:,} more characters)"
