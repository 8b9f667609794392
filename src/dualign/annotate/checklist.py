"""Checklists: weighted criteria that a response meets or not, each with a verdict and a reason of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from typing import Any

from pydantic import Field, ValidationError, field_validator

from dualign.annotate import extract, statements
from dualign.annotate.extract import Extracted
from dualign.common.errors import UserError
from dualign.common.settings import Settings
from dualign.common.types import Label

TEMPLATE = """\
You are an experienced rater of what assistants say. You will see a CONTEXT, a RESPONSE to it and one CRITERION.

Judge whether the RESPONSE as a whole meets the CRITERION, and nothing else about it. If the CRITERION has several
parts, all of them must be met.

CONTEXT:
{context}

RESPONSE:
{response}

CRITERION:
{criterion}

Does the RESPONSE meet the CRITERION?
Reply with yes or no alone.
"""


class Criterion(Settings):
    text: str = Field(min_length=1, description="what a response is to be or do")
    weight: float = Field(1.0, description="its share; below 0: to be avoided")
    name: str | None = Field(None, description="short, for the report; default: the text")

    @field_validator("weight")
    @classmethod
    def _counts(cls, weight: float) -> float:
        if not math.isfinite(weight) or weight == 0:
            raise ValueError("a number other than 0")
        return weight


class Checklist(Settings):
    criteria: list[Criterion] = Field(default_factory=list, description="texts, or {text, weight, name}")
    column: str | None = Field(None, description="the data's column with the row's own criteria, after these")
    template: str = Field(TEMPLATE, description="the prompt, with {context}, {response} and {criterion}")

    @field_validator("criteria", mode="before")
    @classmethod
    def _plain(cls, given: Any) -> Any:
        return [{"text": c} if isinstance(c, str) else c for c in given] if isinstance(given, list) else given


def of_row(value: Any, where: str) -> list[Criterion]:
    """The criteria in a row's column: a list (or the list as JSON) of texts or mappings; `criterion` and `points`, as
    HealthBench has them, are read as `text` and `weight`. Raises UserError with the row."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise UserError(f"{where}: expected a list of criteria, got the text {value[:60]!r}") from None
    if not isinstance(value, Sequence):
        raise UserError(f"{where}: expected a list of criteria, got {type(value).__name__}")
    found = []
    for number, each in enumerate(value, 1):
        tree = {"text": each} if isinstance(each, str) else dict(each) if isinstance(each, dict) else {}
        for theirs, ours in (("criterion", "text"), ("points", "weight")):
            if theirs in tree:
                tree.setdefault(ours, tree[theirs])
        try:
            found.append(Criterion.model_validate({k: tree[k] for k in ("text", "weight", "name") if k in tree}))
        except ValidationError as error:
            raise UserError(f"{where}, criterion {number}: {error.errors()[0]['msg']}") from None
    return found


def total(criteria: Sequence[Criterion], verdicts: Sequence[Label]) -> float | None:
    """Σ weight · met / Σ positive weight, over the criteria that have a verdict: 1 where all that is wanted is there and
    nothing that is not. None where no wanted criterion has a verdict."""
    answered = [(c.weight, v.value) for c, v in zip(criteria, verdicts, strict=True) if v.value is not None]
    wanted = math.fsum(weight for weight, _ in answered if weight > 0)
    return math.fsum(weight * met for weight, met in answered) / wanted if wanted else None


def told(criteria: Sequence[Criterion], verdicts: Sequence[Label]) -> str:
    """A line per criterion, for people: met, not met, or why there is no verdict; then the judge's words."""
    lines = []
    for criterion, verdict in zip(criteria, verdicts, strict=True):
        said = "absent" if verdict.value is None else "yes" if verdict.value else "no"
        words = " ".join((verdict.note or "").split()) if verdict.value is not None else verdict.reason
        lines.append(f"[{said}] {criterion.name or criterion.text} (weight {criterion.weight:g}): {words}")
    return "\n".join(lines)


BEGUN = re.compile(r"(?i)\W*(?:(?:criterion )?(?:met|meets|answer|verdict)\W+)?(yes|no)\b")
MET = re.compile(rf"{BEGUN.pattern}(?=\W*$|\s*[.,;:!–—]|\s+(?:because|since|as)\b)")
TURNED = re.compile(r"(?i)(?:[.,;:!/|—–-]\s*|\b(?:but|or|and|however),?\s+)(yes|no)\b")  # in the same line


KEYS = re.compile(r"(?i)(?:criterion[ _-]?)?met|meets|verdict|answer")


def yes_or_no(reply: str, cut: bool, echoes: Sequence[str]) -> Extracted:
    """1 for yes, 0 for no: by the key of a reply that is JSON, else by the word that the reply begins with or that is
    its last line. Both, or neither, is absent. What the judged texts say does not count."""
    whole, reason = statements.of_reply(reply, cut, echoes)
    if whole is not None:
        return _by_key(whole)
    own, reason = ("", reason) if reason else extract.own_words(reply, echoes)
    if reason:
        return Extracted(None, reason)
    if (block := statements.fenced(own, echoes)) is not None:
        return _by_key(block)
    lines = [line for line in extract.unquoted(own).split("\n") if line.strip()]
    said = {word for line in lines[:1] for word in _words(line)}
    said |= {word for line in lines[1:] if (word := _alone(line))}
    begun = {m[1].lower() for line in lines if (m := BEGUN.match(line))}
    if len(said) == 1 and begun <= said and not (cut and len(lines) == 1 and _alone(lines[0])):
        return Extracted(1.0 if said == {"yes"} else 0.0, rule="word")
    return Extracted(None, "both yes and no" if said else "cut off before an answer" if cut else "neither yes nor no")


def _words(line: str) -> set[str]:
    """What the first line answers: its first word, where that is a verdict, and whatever it turns to."""
    found = MET.match(line)
    return {found[1].lower(), *(word.lower() for word in TURNED.findall(line[found.end() :]))} if found else set()


def _alone(line: str) -> str | None:
    found = MET.match(line)
    return found[1].lower() if found and not line[found.end() :].strip(" .!*_`'\"") else None


def _by_key(text: str) -> Extracted:
    """By the verdict's key; several keys must agree, also one that is given twice."""
    try:
        pairs = json.loads(statements.TRAILING_COMMA.sub("", text), strict=False, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return Extracted(None, "JSON that cannot be read")
    named = [pair for pair in pairs if isinstance(pair, tuple)] if isinstance(pairs, list) else []
    words = {str(value).strip().lower() for key, value in named if KEYS.fullmatch(key)}
    read = {"true": 1.0, "yes": 1.0, "false": 0.0, "no": 0.0}
    if len(words) != 1 or not words <= read.keys():
        return Extracted(None, "no verdict in the reply")
    return Extracted(read[words.pop()], rule="json")
