"""Conversations in rows: messages as templates take them, and the conversation that a prompt and its completions are
parts of. Nothing of a message is lost: tool calls, reasoning, names and whatever else it has stay with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from dualign.common.errors import UserError
from dualign.common.types import Message

FOREIGN_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}  # templates take any
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool")} | FOREIGN_ROLES


def read_messages(where: str, column: str, value: Any) -> list[Message]:
    """The messages of a column: `content` is text, null fields are left out, arguments of tool calls are objects.
    Raises UserError with the row, the column and the message."""
    if not isinstance(value, list):
        raise UserError(f"{where}: {column!r} must be text or a list of messages, got {kind_of(value)}")
    if not value:
        raise UserError(f"{where}: {column!r} is empty")
    return [_message(f"{where}: {column!r}, message {n}", message) for n, message in enumerate(value, 1)]


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: expected text under 'role' and 'content'")
    role = message["role"]
    if (known := ROLES.get(role.strip().lower(), role)) != role:
        raise UserError(f"{where}: the role {role!r} must be {known!r}")
    rest = {k: v for k, v in message.items() if v is not None and k not in ("role", "content")}
    calls = rest.pop("tool_calls", None)
    said = {"tool_calls": _calls(where, calls)} if calls else {}
    speaks = said or rest.get("reasoning_content")  # such a turn may have no content
    content = "" if message.get("content") is None and speaks else _content(where, message.get("content"))
    whole = {"role": role, "content": content, **rest, **said}
    check_text(where, whole)
    return whole


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"{where}: expected text under 'role' and 'content'")
    for n, part in enumerate(content, 1):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else None
            what = f"is of the type {kind!r}" if kind not in (None, "text") else "has no text"
            raise UserError(f"{where}: part {n} of its content {what}; parts must be {{type: text, text: ...}}")
    return "".join(part["text"] for part in content)


def _calls(where: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls, their arguments as objects: templates write them as JSON themselves."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"{where}: 'tool_calls' must be a list of objects")
    return [_call(call) for call in calls]


def _call(call: dict[str, Any]) -> dict[str, Any]:
    call = {k: v for k, v in call.items() if v is not None}
    if isinstance(call.get("function"), dict):
        return {**call, "function": _call(call["function"])}
    if isinstance(call.get("arguments"), str) and isinstance(parsed := _parsed(call["arguments"]), dict):
        return {**call, "arguments": parsed}
    return call


def read_json(where: str, column: str, value: Any, kind: type[list[Any]] | type[dict[str, Any]]) -> Any:
    """A column that holds a list or an object, or one as JSON text; None where it is empty."""
    parsed = _parsed(value) if isinstance(value, str) else value
    if not value or not parsed:
        return None
    if not isinstance(parsed, kind) or (kind is list and not all(isinstance(x, dict) for x in parsed)):
        what = "a list of objects" if kind is list else "an object"
        raise UserError(
            f"{where}: {column!r} must be {what}, or that as JSON, for the chat template; got {value!r:.80}"
        )
    check_text(f"{where}: {column!r}", parsed)
    return parsed


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def joined(where: str, names: tuple[str, str], prompt: Sequence[Message], given: list[Message]) -> list[Message]:
    """The whole conversation, of a prompt's messages and of those under chosen, rejected or completion: either these
    go on from the prompt, or the prompt is where they begin (a system message may stand in one of the two alone) or
    the turns before their last. Raises UserError where the two are of different conversations."""
    if not prompt or _begins(given, prompt):
        return given
    if given[0]["role"] == "assistant" != prompt[0]["role"]:
        return [*prompt, *given]
    if _same(given[-1 - len(prompt) : -1], prompt):
        return given
    if given[0]["role"] == "system" != prompt[0]["role"] and _begins(given[1:], prompt):
        return given
    if prompt[0]["role"] == "system" != given[0]["role"] and prompt[1:] and _begins(given, prompt[1:]):
        return [prompt[0], *given]
    if prompt[-1]["role"] == "assistant":
        return [*prompt, *given]
    raise UserError(
        f"{where}: {names[1]!r} is of another conversation than {names[0]!r}: it begins with "
        f"{_quoted(given[0])}, the prompt with {_quoted(prompt[0])}"
    )


def _begins(given: Sequence[Message], prompt: Sequence[Message]) -> bool:
    return len(given) > len(prompt) and _same(given[: len(prompt)], prompt)


def _same(some: Sequence[Message], others: Sequence[Message]) -> bool:
    def key(message: Message) -> Any:
        return message["role"], message["content"].strip(), message.get("tool_calls")

    return [key(m) for m in some] == [key(m) for m in others]


def _quoted(message: Message) -> str:
    text = message["content"]
    return f"the {message['role']}'s {text[:40] + ('...' if len(text) > 40 else '')!r}"


def without_nulls(value: Any) -> Any:
    """`value` without fields that are null: Arrow gives every object of a column the fields of all the others."""
    if isinstance(value, dict):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def as_json(value: Any) -> Any:
    """`value` in JSON's types, so that what is read back from a file of JSON is the same: decimals are numbers, dates
    and times ISO 8601 text, durations seconds, bytes text (hexadecimal where they are not UTF-8), others their text."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, dict):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, Decimal):
        return float(value)
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return value.hex()
    return str(value)


def check_text(where: str, value: Any) -> None:
    """Raises UserError where a text of `value`, however deep, holds half of a surrogate pair, which JSON can, and no
    tokenizer, file or request."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} holds {value[error.start]!a}, half of a character") from None
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            check_text(where, part)


def kind_of(value: Any) -> str:
    return "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
