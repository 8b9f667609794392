"""In what form a judge is to reply: as text, as JSON by a schema, or as one of a few choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

Form = Literal["text", "json", "choice"]
Question = Literal["score", "pair", "criterion", "ranking"]
REASON = 400  # characters of a reason at most, where the server can hold a judge to it
CHOICES = 101  # values that a scale may have to be chosen from


def wants(question: Question, form: Form, scale: Sequence[float]) -> dict[str, Any]:
    """What is asked of the server for such a reply (see `dialect`). `scale`: lowest and highest score. Raises
    ValueError for a scale that has no list of choices."""
    if form == "text":
        return {}
    if form == "choice" and question == "ranking":
        raise ValueError("reply: choice has no place for a ranking: use json or text")
    if form == "choice":
        return {"choice": [str(v) if question != "criterion" else v for v in _values(question, scale, needed=True)]}
    key, value = _answer(question, scale)
    properties = {"reason": {"type": "string", "maxLength": REASON}, key: value}
    return {"schema": {"type": "object", "properties": properties, "required": ["reason", key],
                       "additionalProperties": False}}  # fmt: skip


def in_words(question: Question, form: Form, scale: Sequence[float]) -> str | None:
    """How the judge is told of the form; None where the rubric's own words say it."""
    if form != "json":
        return None
    said = {
        "score": f'"score": a {"whole " if _whole(scale) else ""}number from {scale[0]:g} to {scale[1]:g}',
        "pair": '"choice": 1 or 2',
        "criterion": '"met": true or false',
        "ranking": '"ranking": the list of their numbers, the best first',
    }[question]
    return f'Reply with one JSON object and nothing else: {{"reason": one or two sentences, {said}}}.'


def _answer(question: Question, scale: Sequence[float]) -> tuple[str, Mapping[str, Any]]:
    if question == "criterion":
        return "met", {"type": "boolean"}
    if question == "ranking":
        return "ranking", {"type": "array", "items": {"type": "integer"}}
    key = "score" if question == "score" else "choice"
    values = _values(question, scale)
    return key, {"type": "integer", "enum": values} if values else {"type": "number"}


def _values(question: Question, scale: Sequence[float], needed: bool = False) -> list[Any]:
    if question == "pair":
        return [1, 2]
    if question == "criterion":
        return ["yes", "no"]
    if _whole(scale):
        return list(range(int(scale[0]), int(scale[1]) + 1))
    if needed:
        raise ValueError(f"reply: choice needs a scale of whole numbers, at most {CHOICES}; the rubric's is {scale}")
    return []


def _whole(scale: Sequence[float]) -> bool:
    low, high = scale
    return low == int(low) and high == int(high) and 2 <= high - low < CHOICES  # 0 to 1 is a share
