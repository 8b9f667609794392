"""A row's layout: which of its columns are the prompt and the completions, and what they say together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dualign.common.errors import UserError
from dualign.common.types import TEMPLATE_COLUMNS, Message, Prompt, text_of
from dualign.data.conversation import check_text, joined, kind_of, read_json, read_messages
from dualign.data.settings import DataConfig

Content = str | tuple[Message, ...]


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` names its file and 1-based row for people."""

    where: str
    default_id: str
    values: Mapping[str, Any]


def layout_of(values: Mapping[str, Any], config: DataConfig) -> str:
    if "chosen" in values and "rejected" in values:
        raw = isinstance(values["chosen"], str) and values["chosen"].lstrip().startswith("Human:")
        return "hh" if raw and config.prompt_column not in values else "preference"
    if "completion" in values:
        return "completion"
    named = config.prompt_column in values and config.prompt_column != "messages"
    return "messages" if "messages" in values and not named else "prompt"


def parse(
    row: Row, layout: str, config: DataConfig, prompts_only: bool, answers: Sequence[str] = ()
) -> tuple[Content, list[str | Message]]:
    """The prompt, and the completions the layout promises: none, one or (chosen, rejected). Each is text, or where the
    prompt is a conversation the assistant's message; what stands before it is in the prompt. `answers`: the columns of
    a prompt's completions where these are others."""
    names = {
        "prompt": tuple(answers),
        "completion": ("completion",),
        "messages": ("messages",),
        "preference": ("chosen", "rejected"),
    }
    if layout == "hh":
        return _parse_transcripts(row, config)
    own = layout == "messages" and config.prompt_column == "messages"
    alone = own or (layout in ("messages", "preference") and config.prompt_column not in row.values)
    column = names[layout][0] if alone else config.prompt_column
    prompt = None if alone else _value(row, column)
    given = {name: _value(row, name) for name in names.get(layout, ())}
    if given and layout != "messages" and all(isinstance(x, str) for x in ("" if alone else prompt, *given.values())):
        return _parse_texts(row, column, prompt, given)
    turns: list[Message] = []
    if isinstance(prompt, str):
        text = _text(row, column, prompt)
        if not given:
            return text, []
        turns = [{"role": "user", "content": text}]
    elif not alone:
        turns = read_messages(row.where, column, prompt)
    if not given:
        return _context(row, column, turns), []
    wholes = {name: _whole(row, name, value, column, turns) for name, value in given.items()}
    if layout == "messages" and prompts_only and wholes["messages"][-1]["role"] != "assistant":
        return _context(row, column, wholes["messages"]), []
    return _parted(row, column, wholes)


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        near = difflib.get_close_matches(column, row.values, 1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        if column not in {"chosen", "rejected", "completion", "messages"}:
            hint += " Which one holds the prompt: data.prompt_column in a recipe, else --prompt-column"
        raise UserError(f"{row.where}: no column {column!r}; its columns are {', '.join(row.values) or 'none'}{hint}")
    return row.values[column]


def _text(row: Row, column: str, value: str) -> str:
    if not value.strip():
        raise UserError(f"{row.where}: {column!r} is empty")
    check_text(f"{row.where}: {column!r}", value)
    return value


def _parse_texts(row: Row, column: str, prompt: str | None, given: dict[str, str]) -> tuple[str, list[str | Message]]:
    """A plain prompt and plain completions. Without a prompt, it is what the two begin with, to the last whole word."""
    texts = [_text(row, name, value) for name, value in given.items()]
    if prompt is None:
        if texts[0] == texts[-1]:
            raise UserError(f"{row.where}: no prompt column, and 'chosen' and 'rejected' are the same text")
        same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False)))
        prompt = re.sub(r"\S*\Z", "", same).rstrip()
        if not prompt:
            raise _nothing_in_common(row)
        texts = [_text(row, name, text[len(prompt) :]) for name, text in zip(given, texts, strict=True)]
    return _text(row, column, prompt), [*texts]


def _whole(row: Row, name: str, value: Any, column: str, prompt: list[Message]) -> list[Message]:
    """The conversation that a completion ends."""
    if isinstance(value, str) and name != "messages":
        return [*prompt, {"role": "assistant", "content": _text(row, name, value)}]
    given = read_messages(row.where, name, value)
    if given[-1]["role"] != "assistant" and name != "messages":
        raise UserError(f"{row.where}: {name!r} must end with the assistant's message")
    return joined(row.where, (column, name), prompt, given)


def _parted(row: Row, column: str, wholes: dict[str, list[Message]]) -> tuple[Content, list[str | Message]]:
    """What conversations have in common, and their last messages."""
    for name, whole in wholes.items():
        if whole[-1]["role"] != "assistant":
            raise UserError(f"{row.where}: {name!r} must end with the assistant's message")
        if not text_of(whole[-1]).strip():
            raise UserError(f"{row.where}: {name!r} is empty")
    context, *others = [whole[:-1] for whole in wholes.values()]
    if any(other != context for other in others):
        raise UserError(
            f"{row.where}: {' and '.join(map(repr, wholes))} differ before their last message, which alone is the answer"
        )
    if not context:
        raise _nothing_in_common(row) if others else UserError(f"{row.where}: {column!r} has no turn before its last")
    return _context(row, column, context), [whole[-1] for whole in wholes.values()]


def _nothing_in_common(row: Row) -> UserError:
    return UserError(f"{row.where}: no prompt column, and 'chosen' and 'rejected' have no beginning in common")


def _context(row: Row, column: str, messages: list[Message]) -> tuple[Message, ...]:
    """The prompt that a conversation is: it ends where the assistant is to speak."""
    last = messages[-1]
    if last["role"] == "assistant":
        raise UserError(f"{row.where}: {column!r} ends with the assistant's turn; a prompt ends where it is to speak")
    if last["role"] != "tool" and not last["content"].strip():
        raise UserError(f"{row.where}: {column!r} ends with an empty message")
    return tuple(messages)


def _parse_transcripts(row: Row, config: DataConfig) -> tuple[Content, list[str | Message]]:
    """hh-rlhf: whole dialogues under chosen and rejected, or one that ends with "Assistant:" in the prompt column."""
    if config.prompt_column in row.values:
        return _context(row, config.prompt_column, _transcript(row, config.prompt_column)), []
    return _parted(row, "chosen", {name: _transcript(row, name) for name in ("chosen", "rejected")})


def _transcript(row: Row, column: str) -> list[Message]:
    text = _value(row, column)
    if not isinstance(text, str):
        raise UserError(f"{row.where}: {column!r} must be a transcript, got {kind_of(text)}")
    check_text(f"{row.where}: {column!r}", text)
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]
    if parts[0].strip() or not messages:
        raise UserError(f"{row.where}: {column!r} must begin with 'Human:' or 'Assistant:' on a paragraph of its own")
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def prompt_of(row: Row, content: Content, config: DataConfig) -> Prompt:
    if config.chat and isinstance(content, str):
        content = ({"role": "user", "content": content},)
    if config.system_prompt and not isinstance(content, str) and content[0]["role"] not in ("system", "developer"):
        content = ({"role": "system", "content": config.system_prompt}, *content)
    columns = {k: v for k, v in row.values.items() if k != config.prompt_column}
    for name, kind in TEMPLATE_COLUMNS.items() if not isinstance(content, str) else ():
        if name in columns:
            columns[name] = read_json(row.where, name, columns[name], kind)
    given = row.values.get("id")
    return Prompt(row.default_id if given is None else str(given), content, columns, row.where)
