"""Files of prompts with responses, in every layout that has them, and files of labels, written whole or not at all."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualign.annotate.agreement import Pair
from dualign.errors import UserError
from dualign.types import Prompt


@dataclass(frozen=True)
class Responses:
    """One row: a prompt and its responses by name (a, b; chosen, rejected; completion)."""

    id: str
    prompt: Prompt
    texts: Mapping[str, str]


def load_responses(source: str, limit: int | None = None) -> list[Responses]:
    """Rows of `source`, `limit` of them drawn at random (always the same ones). Raises UserError for rows that have no
    response_a/response_b, chosen/rejected or completion."""
    from dualign.data import load_examples, load_prompts

    prompts = load_prompts(source)
    if {"response_a", "response_b"} <= set(prompts[0].columns):
        rows = [Responses(p.id, p, {s: _text(p, f"response_{s}", source) for s in "ab"}) for p in prompts]
    else:
        names = {1: ("completion",), 2: ("chosen", "rejected")}
        rows = [
            Responses(e.prompt.id, e.prompt, dict(zip(names[len(e.completions)], e.completions, strict=True)))
            for e in load_examples(source)
        ]
    if limit is not None and limit < len(rows):
        rows = [rows[i] for i in sorted(random.Random(0).sample(range(len(rows)), limit))]
    return rows


def load_pairs(source: str, limit: int | None = None) -> list[Pair]:
    """Pairs that people labelled: response_a, response_b with `label` (a, b, tie) and perhaps `votes`, or chosen and
    rejected. Raises UserError naming the row."""
    pairs = []
    for row in load_responses(source, limit):
        if len(row.texts) != 2:
            raise UserError(f"{source}: row {row.id}: needs two responses and which one people preferred")
        a, b = row.texts.values()
        if "chosen" in row.texts:
            pairs.append(Pair(row.id, row.prompt, a, b, "a"))
            continue
        label = row.prompt.columns.get("label")
        if label not in ("a", "b", "tie"):
            raise UserError(f"{source}: row {row.id}: label: expected a, b or tie, found {label!r}")
        votes = row.prompt.columns.get("votes")
        if votes is not None and not (
            isinstance(votes, Mapping)
            and all(side in ("a", "b", "tie") and isinstance(n, int | None) for side, n in votes.items())
        ):
            raise UserError(f"{source}: row {row.id}: votes: expected counts of a, b and tie, found {votes!r}")
        pairs.append(Pair(row.id, row.prompt, a, b, label, votes))
    return pairs


def _text(prompt: Prompt, column: str, source: str) -> str:
    from dualign.conversation import check_text, read_messages
    from dualign.types import text_of

    where, value = f"{source}: row {prompt.id}", prompt.columns.get(column)
    text = value if isinstance(value, str) else text_of(read_messages(where, column, value)[-1])
    check_text(f"{where}: {column!r}", text)
    return text


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines or Parquet by suffix, beside `path` first, then renamed: a file that is there is whole."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: the output ends in .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        (_write_jsonl if path.suffix == ".jsonl" else _write_parquet)(aside, rows)
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rewards = {"reward": pa.float64(), "value": pa.float64()}
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    writer = None
    try:
        for chunk in _chunks(rows, 1000):
            if writer is None:
                types = {**dict.fromkeys(chunk[0], pa.string()), **rewards, "prompt": messages}
                schema = pa.schema([(name, types[name]) for name in chunk[0]])
                writer = pq.ParquetWriter(path, schema, compression="zstd")
            writer.write_table(pa.Table.from_pylist(chunk, schema=schema))
    finally:
        if writer:
            writer.close()


def _chunks(rows: Iterable[Mapping[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    chunk: list[dict[str, Any]] = []
    for row in rows:
        chunk.append(dict(row))
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def read_rewards(path: Path) -> dict[tuple[str, str], float]:
    """Rewards by (id, response) of a file that `dualign judge` wrote. Absent ones are left out. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    found: dict[tuple[str, str], float] = {}
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            rows: Iterable[Any] = pq.read_table(path).to_pylist()
        else:  # not splitlines: a text may hold other kinds of line ends
            rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line.strip()]
        for row in rows:
            key = (row["id"], row["response"])
            if key in found:
                raise UserError(f"{path}: two rewards for {key[1]!r} of row {key[0]!r}; ids must be unique")
            if row["reward"] is not None:
                found[key] = float(row["reward"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(
            f"{path}: expected rows with id, response and reward, as `dualign judge` writes them ({error})"
        ) from None
    return found
