"""Pairs that people labelled, and files of labels, written whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dualign.annotate.agreement import Pair
from dualign.annotate.judge_sets import Choice, choice, is_judgebench, is_rewardbench2, judgebench_pair, some
from dualign.common.durable import durable
from dualign.common.errors import UserError
from dualign.data.responses import Responses, load_responses
from dualign.data.rows import read_rows
from dualign.data.settings import DataConfig
from dualign.models.template import arguments_as_json


def load_pairs(source: str, limit: int | None = None, prompt_column: str = "prompt") -> tuple[list[Pair], Counter[str]]:
    """Pairs that people labelled: response_a, response_b with `label` (a, b, tie) and perhaps `votes`, or chosen and
    rejected, or JudgeBench's rows; and why others were left out, which lack a response. Who wrote them is in model_a and
    model_b, or chosen_model and rejected_model. Raises UserError naming the row."""
    pairs = []
    rows, _ = read_rows(source, DataConfig(train=source, prompt_column=prompt_column))
    if is_judgebench(rows[0].values):
        return [judgebench_pair(row) for row in some(rows, limit)], Counter()
    absent: Counter[str] = Counter()
    for row in load_responses(source, limit, DataConfig(train=source, prompt_column=prompt_column)):
        if len(row.texts) != 2:
            raise UserError(f"{source}: row {row.id}: needs two responses and which one people preferred")
        if row.absent:
            absent[row.absent] += 1
            continue
        a, b = (text or "" for text in row.texts.values())
        if "chosen" in row.texts:
            pairs.append(Pair(row.id, row.prompt, a, b, "a", models=_models(row, "chosen_model", "rejected_model")))
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
        pairs.append(Pair(row.id, row.prompt, a, b, label, votes, _models(row, "model_a", "model_b")))
    if not pairs:
        raise UserError(f"{source}: no row has both responses: {next(iter(absent))}")
    return pairs, absent


def load_choices(source: str, limit: int | None = None) -> list[Choice] | None:
    """The rows of a file in RewardBench 2's layout; None for any other."""
    rows, _ = read_rows(source, DataConfig(train=source, format="prompt"))
    return [choice(row) for row in some(rows, limit)] if is_rewardbench2(rows[0].values) else None


def _models(row: Responses, *keys: str) -> tuple[str | None, str | None]:
    one, two = (row.prompt.columns.get(key) for key in keys)
    return (one, two) if isinstance(one, str) and isinstance(two, str) else (None, None)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """JSON Lines or Parquet by suffix: a file that is there is whole."""
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path}: the output ends in .jsonl or .parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    write = _write_jsonl if path.suffix == ".jsonl" else _write_parquet
    durable(path, lambda aside: write(aside, rows))


def _write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = [{**row, "prompt": arguments_as_json(row["prompt"])} if "prompt" in row else row for row in rows]
    rewards = {"reward": pa.float64(), "value": pa.float64()}
    columns = list(table[0]) if table else []
    try:
        prompts = pa.array([row.get("prompt") for row in table])
        types = {**dict.fromkeys(columns, pa.string()), **rewards, "prompt": prompts.type}
        schema = pa.schema([(name, types[name]) for name in columns])
        pq.write_table(pa.Table.from_pylist(table, schema=schema), path, compression="zstd")
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as error:
        raise UserError(f"the prompts' messages do not fit one Parquet column: {error}; write .jsonl") from None


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
