"""Completions by the hundred thousand: which prompts there are, in what order, and one of them in full. A file is read a
few rows at a time, and only the columns that are asked for, so memory stays flat."""

from __future__ import annotations

import json
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from dualign.eval.report import answers
from dualign.eval.report.answers import Json
from dualign.eval.view.folders import stamp
from dualign.eval.view.query import Query

TOGETHER = 4 << 20  # bytes that are decoded together
HELD = 3_000_000  # numbers of all indices that are remembered
SNIPPET = 240  # characters of a prompt in the list
LONGEST = 6000  # characters of a text before it is asked for by pieces
PIECE = 40_000

SORTS = {"best": "reward", "worst": "reward", "spread": "reward", "weight": "algo.weight", "tokens": "completion_ids"}
LIGHT = ("group", "prompt_id", "prompt", "reward", "algo.weight")


@dataclass(frozen=True)
class Index:
    """The prompts of one file that a query finds: where each one's completions begin, and how many they are. `key`: what
    they are sorted by, the smallest first."""

    start_G: np.ndarray
    count_G: np.ndarray
    key_G: np.ndarray

    @property
    def size(self) -> int:
        return 3 * len(self.start_G) + 16


class Completions:
    """Indices of files, remembered as long as there is room."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._indices: OrderedDict[Any, Index] = OrderedDict()
        self._held = 0

    def index(self, path: Path, query: Query, sort: str) -> Index:
        """Of a file. Raises OSError or pyarrow's errors for one that is damaged."""
        key = (path, stamp(path), " ".join(query.text.split()), sort)
        with self._lock:
            if (found := self._indices.get(key)) is not None:
                self._indices.move_to_end(key)
                return found
        found = _index(path, query, sort)
        with self._lock:
            if key not in self._indices:
                self._indices[key] = found
                self._held += found.size
            while self._held > HELD and len(self._indices) > 1:
                self._held -= self._indices.popitem(last=False)[1].size
        return found


def _index(path: Path, query: Query, sort: str) -> Index:
    wanted = {"group", *query.columns, *([SORTS[sort]] if sort in SORTS else [])}
    groups, masks, values = [], [], []
    for table in tables(path, wanted):
        groups.append(table["group"].to_numpy())
        masks.append(query.mask(table))
        values.append(_values(table, sort))
    if not groups:
        return Index(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))
    group_N, mask_N, value_N = np.concatenate(groups), np.concatenate(masks), np.concatenate(values)
    start_G = np.flatnonzero(np.append(True, np.diff(group_N) != 0))
    count_G = np.diff(np.append(start_G, len(group_N)))
    found_G = np.maximum.reduceat(mask_N, start_G)
    key_G = _keys(value_N, start_G, sort)
    return Index(
        start_G[found_G].astype(np.int32), count_G[found_G].astype(np.int32), key_G[found_G].astype(np.float32)
    )


def _values(table: pa.Table, sort: str) -> np.ndarray:
    if (name := SORTS.get(sort)) not in table.column_names:
        return np.full(table.num_rows, np.nan)
    column = pc.list_value_length(table[name]) if sort == "tokens" else table[name]
    return np.asarray(column.cast(pa.float64()).to_numpy(zero_copy_only=False), float)


def _keys(value_N: np.ndarray, start_G: np.ndarray, sort: str) -> np.ndarray:
    """The smallest comes first; what is not known comes last."""
    if sort not in SORTS:
        return np.zeros(len(start_G))
    high_G, low_G = np.fmax.reduceat(value_N, start_G), np.fmin.reduceat(value_N, start_G)
    key_G = {"worst": low_G, "spread": low_G - high_G}.get(sort, -high_G)
    return np.where(np.isnan(key_G), np.inf, key_G)


def tables(path: Path, columns: set[str], start: int = 0, count: int | None = None) -> Iterator[pa.Table]:
    """The rows from `start`, some at a time, with those of the columns that the file has."""
    with pq.ParquetFile(path, pre_buffer=False) as file:
        names = [name for name in file.schema_arrow.names if name in columns]
        at, end = 0, math.inf if count is None else start + count
        for batch in file.iter_batches(batch_size=_rows(file, columns), columns=names, use_threads=False):
            low, high = max(start - at, 0), min(end - at, batch.num_rows)
            at += batch.num_rows
            if high > low:
                yield pa.Table.from_batches([batch.slice(low, int(high) - low)])
            if at >= end:
                break


def _rows(file: pq.ParquetFile, columns: set[str]) -> int:
    """How many to decode together, by what the columns take."""
    meta = file.metadata
    parts = [meta.row_group(g).column(c) for g in range(meta.num_row_groups) for c in range(meta.num_columns)]
    size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.partition(".list")[0] in columns)
    return int(np.clip(TOGETHER * meta.num_rows // max(size, 1), 16, 4096))


def names(path: Path) -> list[str]:
    """The columns of a file that hold one value a row."""
    with pq.ParquetFile(path) as file:
        schema = file.schema_arrow
        return [n for n in schema.names if not str(schema.field(n).type).startswith("list")]


def light(path: Path, start: int, count: int) -> Json:
    """A prompt in the list: its last words, the rewards, the largest weight."""
    rows = [row for table in tables(path, set(LIGHT), start, count) for row in table.to_pylist()]
    turns = answers.messages(rows[0]["prompt"])
    weights = [w for row in rows if (w := row.get("algo.weight")) is not None]
    return {
        "id": rows[0]["prompt_id"],
        "prompt": " ".join(str(turns[-1]["content"])[: 4 * SNIPPET].split())[:SNIPPET] if turns else "",
        "rewards": [answers.rounded(row.get("reward")) for row in rows],
        "weight": answers.rounded(max(weights)) if weights else None,
    }


def full(path: Path, start: int, count: int) -> Json:
    """A prompt with everything that is known of its completions."""
    flat = set(names(path)) - {"index"}
    rows = [
        row | {"row": start + i}
        for i, row in enumerate(
            row | {"tokens": len(row["completion_ids"] or ())}
            for table in tables(path, flat | {"completion_ids"}, start, count)
            for row in table.to_pylist()
        )
    ]
    first = rows[0]
    turns = answers.messages(first["prompt"])
    return {
        "id": first["prompt_id"],
        "messages": [t | {"content": t["content"][:LONGEST], "chars": len(t["content"])} for t in turns],
        "columns": {k: str(v)[:400] for k, v in _mapping(first.get("columns")).items()},
        "answers": [_answer(row) for row in rows],
    }


def _answer(row: Json) -> Json:
    """The report's, with what only the files hold: tokens, single rewards, and the lengths of texts that were cut."""
    found = answers.answer(row, math.inf)
    parts = {name: answers.rounded(value) for name, value in _mapping(row.get("parts")).items()}
    more = {
        name.removeprefix("algo."): answers.rounded(float(value))
        for name, value in row.items()
        if name.startswith("algo.") and name not in answers.WEIGHTS and isinstance(value, bool | int | float)
    }
    found |= {"parts": parts, "tokens": row["tokens"], "row": row["row"], "more": more, "chars": len(found["text"])}
    found["text"] = found["text"][:LONGEST]
    if "note" in found:
        found |= {"note_chars": len(found["note"]), "note": found["note"][:LONGEST]}
    return found


def _mapping(text: str | None) -> Json:
    found = json.loads(text) if text else {}
    return found if isinstance(found, dict) else {}


def piece(path: Path, row: int, column: str, start: int) -> Json:
    """Some of one text, from its character `start`; `chars`: how many it has. Raises IndexError for a row that is not
    there."""
    rows = [text for table in tables(path, {column}, row, 1) for text in table[column].to_pylist()]
    text = rows[0] or ""
    if column == "prompt":
        text = answers.prompt_text(text) if text else ""
    return {"text": text[start : start + PIECE], "chars": len(text)}
