"""Benchmarks of judges, read as they are published: JudgeBench (Tan et al. 2025, arXiv:2410.12784), pairs of which one
answer is right, and RewardBench 2 (Malik et al. 2025, arXiv:2506.01937), right answers among wrong ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dualign.annotate.agreement import Human, Pair
from dualign.common.errors import UserError
from dualign.common.types import Prompt, user_prompt
from dualign.data.layouts import Row

JUDGEBENCH = {"pair_id", "question", "response_A", "response_B", "label"}
SIDES: dict[Any, Human] = {"A>B": "a", "B>A": "b", "A=B": "tie"}


@dataclass(frozen=True)
class Choice:
    """A row of RewardBench 2: right answers among wrong ones. `models`: who wrote them, in that order; empty where the
    row does not say."""

    id: str
    prompt: Prompt
    right: tuple[str, ...]
    wrong: tuple[str, ...]
    subset: str
    models: tuple[str, ...] = ()

    @property
    def pair(self) -> Pair | None:
        """The right answer against the first wrong one; None where there are several right ones."""
        if len(self.right) != 1:
            return None
        models = (self.models[0], self.models[1]) if self.models else (None, None)
        return Pair(self.id, self.prompt, self.right[0], self.wrong[0], "a", models=models)


def is_judgebench(values: Mapping[str, Any]) -> bool:
    return values.keys() >= JUDGEBENCH


def is_rewardbench2(values: Mapping[str, Any]) -> bool:
    """By its lists of texts: elsewhere a list is a conversation."""
    texts = [values.get(side) for side in ("chosen", "rejected")]
    return "subset" in values and all(isinstance(x, list) and x and isinstance(x[0], str) for x in texts)


def judgebench_pair(row: Row) -> Pair:
    """Raises UserError naming the row and what is wrong with it."""
    v = row.values
    if v["label"] not in SIDES:
        raise UserError(f"{row.where}: label: expected A>B or B>A, found {v['label']!r}")
    a, b = (_text(row, key, v[key]) for key in ("response_A", "response_B"))
    writer = v.get("response_model")
    return Pair(
        str(v["pair_id"]), _prompt(row, "question", v["pair_id"]), a, b, SIDES[v["label"]], models=(writer, writer)
    )


def choice(row: Row) -> Choice:
    """Raises UserError naming the row and what is wrong with it."""
    v = row.values
    right, wrong = (tuple(_text(row, side, text) for text in v.get(side) or ()) for side in ("chosen", "rejected"))
    if not (right and wrong):
        raise UserError(f"{row.where}: needs a right and a wrong answer: chosen and rejected are lists of texts")
    models = tuple(map(str, v.get("models") or ()))
    same = len(models) == len(right) + len(wrong)
    found = row.default_id if v.get("id") is None else v["id"]
    return Choice(str(found), _prompt(row, "prompt", found), right, wrong, str(v["subset"]), models if same else ())


def _prompt(row: Row, column: str, id: Any) -> Prompt:
    columns = {key: value for key, value in row.values.items() if key not in (column, "chosen", "rejected")}
    asked = user_prompt(str(id), _text(row, column, row.values.get(column)))
    return Prompt(asked.id, asked.content, columns, row.where)


def _text(row: Row, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{row.where}: {key}: expected a text, found {value!r:.80}")
    return value


def some(rows: Sequence[Row], limit: int | None) -> Sequence[Row]:
    """`limit` of them, always the same ones."""
    import random

    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]
