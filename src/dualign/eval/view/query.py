"""What is looked for among completions: `"two words" reward>2 is:clipped prompt:capital id:p12`, read once, and asked of
one Parquet file at a time."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dualign.common.errors import UserError

TERM = re.compile(r'(?:[^\s"]+:)?"[^"]*"?|[^\s"]+')
NUMBER = re.compile(r"^([^<>=:]+?)(<=|>=|<|>|=)(-?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)$", re.IGNORECASE)
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt, ">": operator.gt, "<=": operator.le, ">=": operator.ge, "=": np.isclose,
}  # fmt: skip
NUMBERS = {
    "reward": "reward", "weight": "algo.weight", "advantage": "algo.advantage", "log_w_reg": "algo.log_w_reg",
    "log_w_adv": "algo.log_w_adv",
}  # fmt: skip
TEXTS = ("prompt", "completion", "note")
FLAGS = {"clipped": ("algo.clipped",), "cut": ("finish",), "absent": ("reward",), "note": ("note",)}
MOST_TERMS = 12

Mask = np.ndarray
"""(rows of a table,) bool."""


@dataclass(frozen=True)
class Term:
    """One condition on a completion, and the columns that it reads."""

    columns: tuple[str, ...]
    holds: Callable[[pa.Table], Mask]


@dataclass(frozen=True)
class Query:
    """All conditions, each of which the same completion must meet. `step`: those on the batch's number alone."""

    text: str
    terms: tuple[Term, ...]
    step: tuple[tuple[str, float], ...] = ()

    @property
    def columns(self) -> set[str]:
        return {name for term in self.terms for name in term.columns}

    def of_step(self, step: int) -> bool:
        return all(bool(COMPARE[sign](step, value)) for sign, value in self.step)

    def mask(self, table: pa.Table) -> Mask:
        found = np.ones(table.num_rows, bool)
        for term in self.terms:
            if all(name in table.column_names for name in term.columns):
                found &= term.holds(table)
            else:  # a file without this column, as of a system that has no weights
                found[:] = False
        return found


def parse(text: str) -> Query:
    """Raises UserError for a condition that cannot be meant."""
    terms: list[Term] = []
    steps: list[tuple[str, float]] = []
    for word in TERM.findall(text)[:MOST_TERMS]:
        name, colon, rest = word.partition(":")
        rest = rest.strip('"')
        if number := NUMBER.match(word):
            key, sign, value = number[1], number[2], float(number[3])
            if key in ("step", "batch"):
                steps.append((sign, value))
            else:
                terms.append(_number(key, sign, value))
        elif colon and name == "is":
            if rest not in FLAGS:
                raise UserError(f"is:{rest}: one of {', '.join(f'is:{flag}' for flag in FLAGS)}")
            terms.append(Term(FLAGS[rest], _flag(rest)))
        elif colon and name == "id" and rest:
            terms.append(Term(("prompt_id",), partial(_is_prompt, rest)))
        elif colon and name in TEXTS and rest:
            terms.append(_words((name,), rest))
        elif bare := word.strip('"'):
            terms.append(_words(TEXTS, bare))
    return Query(text, tuple(terms), tuple(steps))


def _number(key: str, sign: str, value: float) -> Term:
    if key == "tokens":
        return Term(("completion_ids",), lambda t: COMPARE[sign](_lengths(t), value))
    if key in NUMBERS:
        return Term((NUMBERS[key],), lambda t: _finite(COMPARE[sign], _floats(t[NUMBERS[key]]), value))
    return Term(("parts",), lambda t: _finite(COMPARE[sign], _part(t, key), value))


def _finite(compare: Callable[[Any, Any], Any], x: np.ndarray, value: float) -> Mask:
    return np.asarray(compare(x, value)) & ~np.isnan(x)


def _lengths(table: pa.Table) -> np.ndarray:
    return np.asarray(pc.list_value_length(table["completion_ids"]).to_numpy(zero_copy_only=False))


def _part(table: pa.Table, name: str) -> np.ndarray:
    """One reward's own values, nan where it gave none."""
    found = np.full(table.num_rows, np.nan)
    for i, text in enumerate(table["parts"].to_pylist()):
        value = json.loads(text).get(name) if text else None
        if isinstance(value, int | float):
            found[i] = value
    return found


def _flag(name: str) -> Callable[[pa.Table], Mask]:
    return {
        "clipped": lambda t: _bools(t["algo.clipped"]),
        "cut": lambda t: _bools(pc.equal(t["finish"], "length")),
        "absent": lambda t: _bools(pc.is_null(t["reward"])),
        "note": lambda t: _bools(pc.greater(pc.binary_length(t["note"]), 0)),
    }[name]


def _is_prompt(id: str, table: pa.Table) -> Mask:
    return _bools(pc.equal(table["prompt_id"], id))


def _words(columns: tuple[str, ...], text: str) -> Term:
    def holds(table: pa.Table) -> Mask:
        found = np.zeros(table.num_rows, bool)
        for name in columns:
            needle = json.dumps(text, ensure_ascii=False)[1:-1] if name == "prompt" else text  # prompts are JSON
            found |= _bools(pc.match_substring(table[name], needle, ignore_case=True))
        return found

    return Term(columns, holds)


def _bools(column: Any) -> Mask:
    return np.asarray(pc.fill_null(column, False).to_numpy(zero_copy_only=False), bool)


def _floats(column: Any) -> np.ndarray:
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), float)
