"""A run for notebooks: its records and completions as tables and data frames, a plot, and HTML that is inert."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dualign.common.errors import UserError, clean
from dualign.common.types import Message, text_of
from dualign.run.metrics import new_names
from dualign.run.table import read_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")
TOKENS = ("prompt_ids", "completion_ids", "sampler_logp", "logp_old", "logp_ref", "value_old")  # a list in each row
PLOTTED = ("reward", "kl", "length", "entropy", "loss", "accuracy")
ROWS, LETTERS = 12, 160  # of a table, and of a text in it, that Jupyter shows
LABELS, COLOURS = ("training", "held out"), ("#0072b2", "#d55e00")  # the colours are told apart by the colour-blind


class Tabled:
    """What is also a table."""

    def table(self) -> pa.Table:
        """As a pyarrow table, one row for each entry."""
        raise NotImplementedError

    def frame(self) -> Any:
        """As a pandas data frame. Raises UserError where pandas is not installed."""
        try:
            import pandas  # noqa: F401
        except ImportError:
            raise UserError("frame() needs pandas: pip install pandas (table() is the same by pyarrow)") from None
        return self.table().to_pandas()

    def _repr_html_(self) -> str:
        return table_html(self.table())


class Records(list[T], Tabled):
    """A list of records. In the table, what a record holds by name stands as `name.part`."""

    def __init__(self, records: Iterable[T], as_record: Callable[[Any], Mapping[str, Any]] = dict) -> None:
        super().__init__(records)
        self._as_record = as_record

    def __repr__(self) -> str:
        last = [f"the last: {_brief(r) if isinstance(r, dict) else repr(r)}" for r in self[-1:]]
        return f"Records({'; '.join([str(len(self)), *last])}; .table(), .frame())"

    def table(self) -> pa.Table:
        flat = [_flat(self._as_record(record)) for record in self]
        names = dict.fromkeys(name for record in flat for name in record)
        return pa.table({name: [record.get(name) for record in flat] for name in names})


class Completions(Tabled):
    """Stored completions with their labels and weights, read when they are asked for. Iterated, each one is a dict."""

    def __init__(self, files: Mapping[int, Path], tokens: bool = False) -> None:
        """`files`: by online batch, or of held-out ones by how many batches were done. `tokens`: with the columns that
        hold a value per token."""
        self.files, self.tokens = dict(files), tokens

    def __len__(self) -> int:
        return sum(pq.read_metadata(path).num_rows for path in self.files.values())

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for step, path in self.files.items():
            yield from self._of(step, path).to_pylist()

    def __repr__(self) -> str:
        return f"Completions({len(self)} of {len(self.files)} files; .table(), .frame())"

    def table(self) -> pa.Table:
        parts = [self._of(step, path) for step, path in self.files.items()]
        return pa.concat_tables(parts, promote_options="permissive") if parts else pa.table({})

    def _of(self, step: int, path: Path) -> pa.Table:
        """A file's table for people: prompts as text, each reward's own value in a column of its own."""
        table = read_table(path).replace_schema_metadata(None)
        kept = {name: table[name] for name in table.column_names if self.tokens or name not in TOKENS}
        parts = [json.loads(each) for each in kept.pop("parts").to_pylist()]
        names = dict.fromkeys(name for each in parts for name in each)
        rewards = {f"parts.{name}": pa.array([each.get(name) for each in parts], pa.float64()) for name in names}
        kept["prompt"] = pa.array([_prompt_text(json.loads(each)) for each in kept["prompt"].to_pylist()], pa.string())
        return pa.table({"step": pa.array([step] * table.num_rows, pa.int32()), **kept, **rewards})


def _prompt_text(content: str | Sequence[Message]) -> str:
    """Plain text as it is; a conversation with who speaks before each turn, unless it is one turn alone."""
    if isinstance(content, str) or len(content) == 1:
        return content if isinstance(content, str) else text_of(content[0])
    return "\n".join(f"{message['role']}: {text_of(message)}" for message in content)


def _brief(record: Mapping[str, Any]) -> str:
    """Its numbers, shortened."""
    return ", ".join(f"{name} {value:.4g}" for name, value in record.items() if is_number(value))


def _flat(record: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in record.items():
        out |= _flat(value, f"{before}{name}.") if isinstance(value, Mapping) else {f"{before}{name}": value}
    return out


def held_out_stats(path: Path) -> dict[str, Any]:
    """An evaluation's means, without reading its rows. Raises UserError where it is damaged."""
    try:
        about = json.loads((pq.read_schema(path).metadata or {})[b"dualign"])
    except (OSError, pa.ArrowException, KeyError, ValueError):
        raise UserError(f"{path}: damaged") from None
    return new_names(about["stats"])


Points = list[tuple[int, float, float | None]]  # online batches done, value, half its 95 % interval


def plot(
    title: str, records: Sequence[Mapping[str, Any]], held_out: Mapping[int, Mapping[str, Any]], names: Sequence[str]
) -> Figure:
    """A panel for each metric over online batches: training's values, held-out means, and 95 % intervals where there
    are some. Raises UserError without matplotlib, and for a metric that the run does not have."""
    try:
        from matplotlib import pyplot
    except ImportError:
        raise UserError("plot() needs matplotlib: pip install 'dualign[plots]'") from None
    training = {record["step"] + 1: record for record in records}
    found = {name: (_points(training, name), _points(held_out, name)) for name in names or PLOTTED}
    shown = {name: both for name, both in found.items() if any(both)}
    if missing := [name for name in names if name not in shown]:
        have = sorted({name for at in (training, held_out) for record in at.values() for name in record})
        raise UserError(f"the run has no {', '.join(missing)} to plot; it has {', '.join(have) or 'nothing yet'}")
    count = max(1, len(shown))
    figure, panels = pyplot.subplots(count, sharex=True, squeeze=False, figsize=(7, 1 + 1.6 * count))
    for axes, (name, both) in zip(panels[:, 0], shown.items(), strict=False):
        for points, label, colour, mark in zip(both, LABELS, COLOURS, ("", "o"), strict=True):
            if points:
                x, y, half = zip(*points, strict=True)
                bars = None if not any(half) else [h or 0.0 for h in half]
                axes.errorbar(x, y, bars, color=colour, marker=mark, label=label, elinewidth=0.8, capsize=2)
        axes.set_ylabel(name)
    if shown:
        panels[0, 0].legend(frameon=False)
    panels[-1, 0].set_xlabel("online batches")
    figure.suptitle(clean(title).replace("$", r"\$"))
    figure.tight_layout()
    pyplot.close(figure)  # else a notebook shows it twice: as pyplot's, and as the cell's result
    return figure


def _points(by_batch: Mapping[int, Mapping[str, Any]], name: str) -> Points:
    values = ((at, record.get(name), record.get(f"{name}_ci")) for at, record in by_batch.items())
    return [(at, value, half if is_number(half) else None) for at, value, half in values if is_number(value)]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and isfinite(value)


def table_html(table: pa.Table) -> str:
    """The last rows. Texts are shortened, escaped and without control codes."""
    head = "".join(f"<th>{_cell(name)}</th>" for name in table.column_names)
    last = table.slice(max(0, table.num_rows - ROWS))
    body = "".join(
        "<tr>" + "".join(f"<td>{_cell(value)}</td>" for value in row.values()) + "</tr>" for row in last.to_pylist()
    )
    note = f"the last {ROWS} of {table.num_rows} rows" if table.num_rows > ROWS else f"{table.num_rows} rows"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{note}</p>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return escape(clean(text if len(text) <= LETTERS else text[:LETTERS] + " …"))


def run_html(name: str, state: str, facts: Mapping[str, str], curves: Mapping[str, Sequence[float]]) -> str:
    """A run at a glance: what it is, and its curves as small pictures."""
    rows = "".join(f"<tr><th>{_cell(key)}</th><td>{_cell(value)}</td></tr>" for key, value in facts.items())
    rows += "".join(f"<tr><th>{_cell(key)}</th><td>{_spark(y)}</td></tr>" for key, y in curves.items() if len(y) > 1)
    return f"<div><b>{_cell(name)}</b> {_cell(state)}<table>{rows}</table></div>"


def _spark(y: Sequence[float], width: int = 240, height: int = 36) -> str:
    low, high = min(y), max(y)
    span = (high - low) or 1.0
    at = [
        f"{2 + i * (width - 4) / (len(y) - 1):.1f},{height - 2 - (v - low) / span * (height - 4):.1f}"
        for i, v in enumerate(y)
    ]
    line = f'<polyline points="{" ".join(at)}" fill="none" stroke="#0072b2" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}">{line}</svg> {y[0]:.3g} → {y[-1]:.3g}'
