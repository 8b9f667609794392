"""Files of prompts with answers, as `dualign sample`, people and other programs write them.

One rule for every command that reads answers: an empty answer is an answer, judged as an empty text; one that is null,
missing or no text is absent, with the reason, and stops nothing.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dualign.common.errors import UserError
from dualign.common.types import Prompt, text_of
from dualign.data.conversation import check_text
from dualign.data.layouts import Row, layout_of, parse, prompt_of
from dualign.data.rows import read_rows
from dualign.data.settings import DataConfig

log = logging.getLogger(__name__)

COLUMNS = {  # of a layout: the answers' names and the columns that hold them
    "prompt": {"a": "response_a", "b": "response_b"},
    "completion": {"completion": "completion"},
    "messages": {"completion": "messages"},
    "preference": {"chosen": "chosen", "rejected": "rejected"},
    "hh": {"chosen": "chosen", "rejected": "rejected"},
}
STAND_IN = "?"  # for an answer that is none, so that its row is read: what it says has no part in the prompt


@dataclass(frozen=True)
class Responses:
    """One row: a prompt and its responses by name (a, b; chosen, rejected; completion). An absent one is None, and
    `reasons` has why."""

    id: str
    prompt: Prompt
    texts: Mapping[str, str | None]
    reasons: Mapping[str, str] = field(default_factory=dict)

    @property
    def absent(self) -> str | None:
        """Why the responses cannot be compared; None where all are there."""
        return next(iter(self.reasons.values()), None)


def load_responses(source: str, limit: int | None = None, config: DataConfig | None = None) -> list[Responses]:
    """Rows of `source`, `limit` of them drawn at random (always the same ones). A row that has no prompt is left out and
    counted. Raises UserError where no row has response_a/response_b, chosen/rejected or completion, and where none of
    these is a text."""
    config = config or DataConfig(train=source)
    rows, layout = read_rows(source, config)
    if config.format == "auto":  # a first row may lack its answer
        layout = next((x for row in rows if (x := layout_of(row.values, config)) != "prompt"), "prompt")
    names = COLUMNS[layout]
    if not any(set(names.values()) <= set(row.values) for row in rows):
        have = ", ".join(rows[0].values)
        wanted = "response_a and response_b, chosen and rejected, or completion"
        raise UserError(f"{source}: needs {wanted} in its rows; their columns are {have}")
    found, faults = [], []
    for row in rows:
        try:
            found.append(_responses(row, layout, names, config))
        except UserError as error:
            faults.append(str(error))
    if not found:
        raise UserError(f"{source}: none of its {len(rows):,} rows can be used; the first: {faults[0]}")
    if not any(text is not None for row in found for text in row.texts.values()):
        raise UserError(f"{source}: none of its rows has an answer; the first, {found[0].id}: {found[0].absent}")
    if faults:
        log.warning(
            "%s: %s of %s rows left out; the first: %s", source, f"{len(faults):,}", f"{len(rows):,}", faults[0]
        )
    if limit is not None and limit < len(found):
        found = [found[i] for i in sorted(random.Random(0).sample(range(len(found)), limit))]
    return found


def _responses(row: Row, layout: str, names: Mapping[str, str], config: DataConfig) -> Responses:
    read = {name: answer_text(row.values.get(column)) for name, column in names.items()}
    none = {name for name, (text, _) in read.items() if not (text and text.strip())}
    talk = next((value for column in names.values() if _is_talk(value := row.values.get(column))), None)
    values = {**row.values, **{names[name]: _stand_in(row.values.get(names[name]), talk) for name in none}}
    content, answers = parse(replace(row, values=values), layout, config, layout == "prompt", tuple(names.values()))
    texts = {name: text for name, (text, _) in read.items()}
    for name, answer in zip(names, answers, strict=False):  # a transcript's, or one with tool calls, is what was parsed
        if name not in none:
            texts[name] = answer if isinstance(answer, str) else text_of(answer)
    reasons = {name: f"{names[name]} {reason}" for name, (_, reason) in read.items() if reason}
    prompt = prompt_of(row, content, config)
    return Responses(prompt.id, prompt, texts, reasons)


def answer_text(value: Any) -> tuple[str | None, str | None]:
    """(the answer's text, None), or (None, why there is none). `value`: text, or messages of which the last is it."""
    if _is_talk(value):
        last = value[-1]
        if last.get("role", "assistant") != "assistant":
            return None, "does not end with the assistant's message"
        value = last.get("content")
        if isinstance(value, list) and all(isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in value):
            value = "".join(part["text"] for part in value)
        if not value and last.get("tool_calls"):
            value = text_of({"content": "", "tool_calls": last["tool_calls"]})
    if value is None:
        return None, "is null or missing"
    if not isinstance(value, str):
        return None, f"is of type {type(value).__name__}: expected a text or a list of messages"
    try:
        check_text("", value)
    except UserError as error:
        return None, str(error).strip()
    return value, None


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[-1], Mapping)


def _stand_in(value: Any, talk: Any) -> Any:
    """Of the same turns as what it stands in for, else as `talk`, another answer that is a conversation."""
    turns = value if _is_talk(value) else talk
    return [*turns[:-1], {**turns[-1], "role": "assistant", "content": STAND_IN}] if turns else STAND_IN
