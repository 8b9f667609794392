"""JSON in a judge's reply, in code fences of any length or without: its short answers, a line each, for the rules of
`extract` to read. What its longer strings say are reasons, not answers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

FENCED = re.compile(r"(?s)```[\w-]*\s*(\{.*?\}|\[\s*\{.*?\])\s*```")  # not a "[[8]]"
WHOLE = re.compile(r"(?s)\A\s*(?:```[\w-]*\s*)?(\{.*\}|\[\s*\{.*\])\s*(?:```)?\s*\Z")
BARE = re.compile(r"(?i)\W*(?:the\s+)?(?:[^\W\d]+\s*)?[\w.,]+(?:\s*(?:/|out of|von|sur|de)\s*\w+|\s*[分点점])?\W*")
WORD_BREAK = re.compile(r"[_-]+|(?<=[a-z])(?=[A-Z])")
SENTENCE = re.compile(r"[.!?;]\s|\n")
REPORTS = re.compile(
    r"(?i)\b(?:prints?|printed|outputs?|returns?|returned|contains?|contained|includes?|included|has|had|quotes?|quoted|"
    r"says?|said|claims?|claimed|writes?|wrote|ends?|begins?|starts?|reads?|would|should|example)\b"
)


def whole(text: str) -> str | None:
    """The answers of a reply that is JSON and nothing else ("" where there are none); None for any other reply."""
    found = WHOLE.match(text)
    return _answers(found[1]) if found else None


def block(text: str, echoes: Sequence[str]) -> str | None:
    """The answers of the one fenced JSON block that begins or ends a reply ("Here is my judgement: ..."). None where
    the sentence beside it reports what somebody else wrote, or where the judged texts (`echoes`) hold the block."""
    found = FENCED.search(text)
    if found is None or text.count("```") != 2:
        return None
    before, after = text[: found.start()].strip(" \n:"), text[found.end() :].strip()
    if before and after:
        return None
    if REPORTS.search(SENTENCE.split(before)[-1]) or REPORTS.search(SENTENCE.split(after)[0]):
        return None
    if any(_bare(found[1]) in _bare(echo) for echo in echoes):
        return None
    return _answers(found[1])


def _answers(block: str) -> str | None:
    try:
        tree = json.loads(block, strict=False, object_pairs_hook=_Pairs)
    except (ValueError, RecursionError):
        return None
    return "\n".join(_lines(tree, ""))


class _Pairs(list[tuple[str, Any]]):
    """An object with every key that it names, also one that it names twice."""


def _lines(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, _Pairs):
        for name, inner in value:
            # {"score": {"value": 7}}
            yield from _lines(inner, key if key and name == "value" else WORD_BREAK.sub(" ", name))
    elif isinstance(value, list):
        for inner in value:
            yield from _lines(inner, key)
    elif value is not None and not isinstance(value, bool) and len(str(value)) <= 24 and BARE.fullmatch(str(value)):
        yield f"{key}: {value}"


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
