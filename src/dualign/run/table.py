"""The weighted batch as a table, one row per completion, and back, bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from dualign.common.errors import UserError
from dualign.common.types import Label, Prompt, Rollout
from dualign.run.batch import Row, WeightedBatch, labelled

_TOKEN_COLUMNS = {
    "logp_old_NT": "logp_old",
    "logp_ref_NT": "logp_ref",
    "value_old_NT": "value_old",
    "logp_behaviour_NT": "logp_behaviour",
}


def read_table(path: Path) -> pa.Table:
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged: {str(error).splitlines()[0]}") from None


def to_table(b: WeightedBatch) -> pa.Table:
    """One row per completion. Per-token columns are lists; what a row without a label has no value for is null."""
    rollouts, labels = [r.rollout for r in b.rows], [r.label for r in b.rows]
    columns: dict[str, pa.Array] = {
        "index": pa.array([r.index for r in rollouts], pa.int32()),
        "group": pa.array([r.group for r in rollouts], pa.int32()),
        "prompt_id": pa.array([r.prompt.id for r in rollouts]),
        "prompt": pa.array([_prompt_text(r.prompt) for r in rollouts]),
        "columns": pa.array([json.dumps(dict(r.prompt.columns), default=str) for r in rollouts]),
        "completion": pa.array([r.text for r in rollouts]),
        "finish": pa.array([r.finish for r in rollouts]),
        "prompt_ids": pa.array([list(r.prompt_ids) for r in rollouts], pa.list_(pa.int32())),
        "completion_ids": pa.array([list(r.completion_ids) for r in rollouts], pa.list_(pa.int32())),
        "sampler_logp": pa.array([list(r.sampler_logp) for r in rollouts], pa.list_(pa.float32())),
        "reward": pa.array([v.value for v in labels], pa.float64()),
        "absent": pa.array([v.reason for v in labels], pa.string()),
        "note": pa.array([v.note for v in labels], pa.string()),
        "parts": pa.array([json.dumps(dict(v.parts)) for v in labels]),
    }
    present = [i for i, v in enumerate(labels) if v.value is not None]
    for name, column in _TOKEN_COLUMNS.items():
        value = getattr(b.batch, name)
        if value is not None:
            columns[column] = _spread(value, b, present)
    for name, value in b.batch.columns.items():
        columns[f"algo.{name}"] = _spread(value, b, present)
    table = pa.table(columns)
    about = {"step": b.step, "stats": b.stats} | ({} if b.gap_absent is None else {"gap_absent": b.gap_absent})
    if b.used_in is not None:
        about["used_in"] = b.used_in
    if b.batch.carried:
        about["carried"] = dict(b.batch.carried)
    return table.replace_schema_metadata({"dualign": json.dumps(about)})


def to_use(b: WeightedBatch) -> pa.Table:
    """What another use of a stored batch adds to it: log-probs and weights, by index."""
    table = to_table(b)
    return table.select([name for name in table.column_names if name == "index" or _is_made(name)])


def from_use(use: pa.Table, batch: pa.Table, step: int) -> WeightedBatch:
    """The inverse of to_use, by the stored batch `step`."""
    kept = batch.select([name for name in batch.column_names if not _is_made(name)])
    for name in use.column_names:
        kept = kept if name == "index" else kept.append_column(name, use[name])
    return from_table(kept.replace_schema_metadata(use.schema.metadata), step)


def _is_made(name: str) -> bool:
    """Whether a column is made for one use of a batch, and not as it was sampled and labelled."""
    return name.startswith("algo.") or name in _TOKEN_COLUMNS.values()


def _spread(value: Tensor, b: WeightedBatch, present: list[int]) -> pa.Array:
    """(N,) or (N, T) of the present rows -> one entry per row, tokens without padding."""
    out: list[Any] = [None] * len(b.rows)
    for i, entry in enumerate(value.tolist()):
        out[present[i]] = entry[: len(b.tokens.completion_ids[i])] if value.dim() > 1 else entry
    kind = pa.bool_() if value.dtype == torch.bool else pa.float32() if value.is_floating_point() else pa.int64()
    return pa.array(out, pa.list_(kind) if value.dim() > 1 else kind)


def from_table(table: pa.Table, step: int) -> WeightedBatch:
    """The inverse of to_table, bit for bit."""
    data = {name: table[name].to_pylist() for name in table.column_names}
    rows = tuple(
        Row(
            Rollout(
                index=data["index"][i],
                group=data["group"][i],
                prompt=_prompt(data["prompt_id"][i], data["prompt"][i], data["columns"][i]),
                prompt_ids=tuple(data["prompt_ids"][i]),
                completion_ids=tuple(data["completion_ids"][i]),
                text=data["completion"][i],
                finish=data["finish"][i],
                sampler_logp=tuple(data["sampler_logp"][i]),
            ),
            Label(data["reward"][i], data["absent"][i], json.loads(data["parts"][i]), data["note"][i]),
        )
        for i in range(table.num_rows)
    )
    about = json.loads(table.schema.metadata[b"dualign"])
    b = labelled(step, rows, about.get("carried"))
    present = [i for i, row in enumerate(rows) if row.label.value is not None]
    kinds = {f.name: f.type for f in table.schema}

    def gather(name: str) -> Tensor:
        values = [data[name][i] for i in present]
        kind = kinds[name].value_type if pa.types.is_list(kinds[name]) else kinds[name]
        dtype = torch.bool if pa.types.is_boolean(kind) else torch.float32 if pa.types.is_floating(kind) else torch.long
        if not pa.types.is_list(kinds[name]):
            return torch.tensor(values, dtype=dtype)
        out = torch.zeros(len(values), b.tokens.width, dtype=dtype)
        for i, v in enumerate(values):
            out[i, : len(v)] = torch.tensor(v, dtype=dtype)
        return out

    tokens: dict[str, Any] = {field: gather(column) for field, column in _TOKEN_COLUMNS.items() if column in data}
    algo = {name.removeprefix("algo."): gather(name) for name in data if name.startswith("algo.")}
    batch = replace(b.batch, reward_N=b.batch.reward_N.float(), **tokens, columns=algo)
    return replace(
        b, batch=batch, stats=about["stats"], gap_absent=about.get("gap_absent"), used_in=about.get("used_in")
    )


def _prompt_text(prompt: Prompt) -> str:
    return json.dumps(prompt.messages if prompt.conversational else prompt.content, ensure_ascii=False)


def _prompt(id: str, content: str, columns: str) -> Prompt:
    parsed = json.loads(content)
    return Prompt(id, parsed if isinstance(parsed, str) else tuple(parsed), json.loads(columns))
