"""Prompts and fixed completions from files and data sets: rows of any Hugging Face layout -> Prompt, Example.

Layouts are Hugging Face TRL's (docs "Dataset formats and types"): prompt-only, prompt-completion and preference, each
plain (text) or conversational (a list of {role, content}); and hh-rlhf's transcripts ("\\n\\nHuman: ...").
"""

from __future__ import annotations

import difflib
import gzip
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from dualign.errors import UserError
from dualign.schema import DataConfig
from dualign.types import Example, Finish, Message, Prompt

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
Content = str | tuple[Message, ...]
FOREIGN_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "bot": "assistant"}  # templates take any
X = TypeVar("X")


@dataclass(frozen=True)
class Row:
    """One row as it was read. `where` names its file and 1-based row for people."""

    where: str
    default_id: str
    values: Mapping[str, Any]


def load_prompts(source: str, config: DataConfig | None = None, split: str | None = None) -> list[Prompt]:
    """The prompts of `source`, in its order; completions it may hold stay in `columns` with every other column.

    `source` is a local file, builtin:NAME[/SPLIT[/KIND]], a folder or a data set's name; `split` (default: config.split)
    counts for the last three. Raises UserError naming the file, the row and the column.
    """
    config = config or DataConfig(train=source)
    rows, layout = _read(source, config, split)
    return [_prompt(row, content, config) for row, content, _ in _parsed(source, rows, layout, config)]


def load_examples(source: str, config: DataConfig | None = None, split: str | None = None) -> list[Example]:
    """The rows of a preference set, completions = (chosen, rejected), or of a prompt-completion set, completions =
    (completion,), in its order. Raises UserError as load_prompts, and where rows hold prompts only."""
    config = config or DataConfig(train=source)
    rows, layout = _read(source, config, split)
    if layout == "prompt":
        have = ", ".join(rows[0].values)
        raise UserError(f"{source}: needs chosen and rejected, or completion, in every row; its columns are {have}")
    return [
        Example(_prompt(row, content, config), completions, _finish(row, len(completions)))
        for row, content, completions in _parsed(source, rows, layout, config)
    ]


def draw(items: Sequence[X], limit: int | None, seed: int = 0) -> list[X]:
    """`limit` of the items in their order, for one seed always the same ones: a draw, not the file's first rows."""
    if limit is None or limit >= len(items):
        return list(items)
    chosen = np.random.default_rng(seed).permutation(len(items))[:limit]
    return [items[i] for i in sorted(chosen.tolist())]


def _finish(row: Row, count: int) -> tuple[Finish, ...]:
    """How each completion ended, by the row's `finish` where it has one: "length" was cut off, and is not given the end
    that it never had."""
    given = row.values.get("finish")
    reasons = ["eos"] * count if given is None else [given] if isinstance(given, str) else given
    if not isinstance(reasons, list) or len(reasons) != count or any(r not in ("eos", "length") for r in reasons):
        what = "eos or length" if count == 1 else f"a list of {count}, each eos or length"
        raise UserError(f"{row.where}: finish: expected {what}, for how the completion ended; got {given!r}")
    return cast(tuple[Finish, ...], tuple(reasons))


def _parsed(
    source: str, rows: list[Row], layout: str, config: DataConfig
) -> Iterator[tuple[Row, Content, tuple[str, ...]]]:
    """Each row's prompt and completions. A row that is not of the layout stops it, or is left out and counted."""
    first: UserError | None = None
    skipped = 0
    for row in rows:
        try:
            content, completions = _parse(row, layout, config)
        except UserError as error:
            if config.bad_rows == "stop":
                raise UserError(f"{error} (data.bad_rows=skip leaves such rows out)") from None
            first, skipped = first or error, skipped + 1
            continue
        yield row, content, completions
    if skipped == len(rows):
        raise UserError(f"{source}: none of its {skipped:,} rows can be used; the first: {first}")
    if skipped:
        log.warning("%s: %s of %s rows left out; the first: %s", source, f"{skipped:,}", f"{len(rows):,}", first)


# ---- rows of a source ------------------------------------------------------------------------------------------------


def _read(source: str, config: DataConfig, split: str | None) -> tuple[list[Row], str]:
    """All rows, and their layout: that of the first row where the format is "auto"."""
    rows = list(_rows(source, config, split or config.split))
    if not rows:
        raise UserError(f"{source}: holds no rows")
    return rows, _layout(rows[0].values, config) if config.format == "auto" else config.format


def local_file(source: str, split: str = "train") -> Path | None:
    """The file that `source` names, there or not; None for a folder and for a data set's name. Raises UserError for
    builtin data that the package does not have."""
    if source.startswith("builtin:"):
        name, part, _ = _builtin(source, split)
        path = Path(str(files("dualign"))) / "prompts" / f"{name}_{part}.jsonl"
        if path.name != f"{name}_{part}.jsonl" or not path.is_file():  # no way out of the package
            have = ", ".join(f"builtin:{p.stem.replace('_', '/')}" for p in sorted(path.parent.glob("*.jsonl")))
            raise UserError(f"{source}: no such data in the package; it has {have or 'none'}")
        return path
    path = Path(source).expanduser()
    looks_local = source.endswith(FILE_SUFFIXES) or source.startswith((".", "/", "~"))
    return path if path.is_file() or (looks_local and not path.is_dir()) else None


def _builtin(source: str, split: str) -> tuple[str, str, str]:
    """builtin:NAME[/SPLIT[/KIND]] -> name, split, kind ("": every kind)."""
    name, _, rest = source.removeprefix("builtin:").partition("/")
    part, _, kind = rest.partition("/")
    return name, part or split, kind


def _rows(source: str, config: DataConfig, split: str) -> Iterator[Row]:
    file = local_file(source, split)
    if file and source.startswith("builtin:") and (kind := _builtin(source, split)[2]):
        yield from _of_kind(source, list(_file_rows(file)), kind)
    elif file:
        yield from _file_rows(file)
    else:
        folder = Path(source).expanduser()
        yield from _dataset_rows(str(folder) if folder.is_dir() else source, config.subset, split)


def _of_kind(source: str, rows: list[Row], kind: str) -> list[Row]:
    chosen = [row for row in rows if row.values["kind"] == kind]
    if not chosen:
        raise UserError(f"{source}: its kinds are {', '.join(sorted({row.values['kind'] for row in rows}))}")
    return chosen


def _file_rows(path: Path) -> Iterator[Row]:
    if not path.is_file():
        near = difflib.get_close_matches(path.name, os.listdir(path.parent) if path.parent.is_dir() else [], 1)
        raise UserError(f"{path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else ""))
    if not path.name.endswith(FILE_SUFFIXES):
        raise UserError(f"{path}: cannot tell its kind; rename it to one of *{', *'.join(FILE_SUFFIXES)}")
    try:
        for number, values in _file_values(path):
            if not isinstance(values, dict):
                raise UserError(f"{path}, row {number}: expected an object of columns, got {_kind(values)}")
            yield Row(f"{path}, row {number}", f"{path.name}:{number}", values)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _file_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value) of a file; a line's number in JSON Lines."""
    if path.name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            yield from enumerate(pq.read_table(path).to_pylist(), 1)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable Parquet file: {error}") from error
        return
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig") as text:
        if ".jsonl" in path.suffixes:
            for number, line in enumerate(text, 1):
                if line.strip():
                    yield number, _json(line, f"{path}, row {number}")
        else:
            values = _json(text.read(), str(path))
            if not isinstance(values, list):
                raise UserError(f"{path}: a .json file must hold one list of rows; one object a line goes in .jsonl")
            yield from enumerate(values, 1)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from error


def load_dataset(name: str, subset: str | None, split: str) -> Any:
    """A data set by name or folder, through Hugging Face `datasets`. No code that comes with it is run."""
    import datasets

    try:
        if (Path(name) / "dataset_info.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, KeyError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"data set {name!r} (subset {subset}, split {split!r}): {type(error).__name__}: {error}. "
            f"For a local file the name must end with {', '.join(FILE_SUFFIXES)}."
        ) from error


def _dataset_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    for number, values in enumerate(load_dataset(name, subset, split), 1):
        yield Row(f"{name} [{split}], row {number}", f"{name}:{split}:{number}", dict(values))


# ---- a row's layout --------------------------------------------------------------------------------------------------


def _layout(values: Mapping[str, Any], config: DataConfig) -> str:
    if "chosen" in values and "rejected" in values:
        raw = isinstance(values["chosen"], str) and values["chosen"].lstrip().startswith("Human:")
        return "hh" if raw and config.prompt_column not in values else "preference"
    return "completion" if "completion" in values else "prompt"


def _parse(row: Row, layout: str, config: DataConfig) -> tuple[Content, tuple[str, ...]]:
    """The prompt, and the completions the layout promises: none, (completion,) or (chosen, rejected)."""
    names = {"prompt": (), "completion": ("completion",), "preference": ("chosen", "rejected")}
    if layout == "hh":
        return _parse_transcripts(row, config)
    given = [_value(row, name) for name in names[layout]]
    if config.prompt_column in row.values or layout != "preference":
        prompt = _value(row, config.prompt_column)
    else:
        prompt, given = _split_common(row, given)
    if isinstance(prompt, str) and given and not any(isinstance(x, str) for x in given):
        prompt = [{"role": "user", "content": prompt}]
    content = _content(row, config.prompt_column, prompt)
    return content, tuple(_completion(row, name, x) for name, x in zip(names[layout], given, strict=True))


def _value(row: Row, column: str) -> Any:
    if column not in row.values:
        near = difflib.get_close_matches(column, row.values, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        if column not in {"chosen", "rejected", "completion"}:
            hint += ". Which one holds the prompt: data.prompt_column in a recipe, --prompt-column of a command"
        raise UserError(f"{row.where}: no column {column!r}; its columns are {', '.join(row.values) or 'none'}{hint}")
    return row.values[column]


def _content(row: Row, column: str, value: Any) -> Content:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{row.where}: {column!r} is empty")
        return encodable(row.where, column, value)
    messages = _messages(row, column, value)
    if messages[-1]["role"] == "assistant":
        raise UserError(f"{row.where}: {column!r} ends with the assistant's turn; a prompt ends where it is to speak")
    if not messages[-1]["content"].strip():
        raise UserError(f"{row.where}: {column!r} ends with an empty message")
    return tuple(messages)


def _messages(row: Row, column: str, value: Any) -> list[Message]:
    if not isinstance(value, list):
        raise UserError(f"{row.where}: {column!r} must be text or a list of messages, got {_kind(value)}")
    if not value:
        raise UserError(f"{row.where}: {column!r} is empty")
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UserError(f"{row.where}: {column!r}, message {n}: expected text under 'role' and 'content'")
        if known := FOREIGN_ROLES.get(message["role"].lower()):
            raise UserError(f"{row.where}: {column!r}, message {n}: the role {message['role']!r} must be {known!r}")
        encodable(row.where, column, message["content"])
    return [{"role": m["role"], "content": m["content"]} for m in value]


def _completion(row: Row, column: str, value: Any) -> str:
    """A completion's text. A conversation must end with the assistant; what stands before was the prompt."""
    if not isinstance(value, str):
        messages = _messages(row, column, value)
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{row.where}: {column!r} must end with the assistant's message")
        value = messages[-1]["content"]
    if not value.strip():
        raise UserError(f"{row.where}: {column!r} is empty")
    return encodable(row.where, column, value)


def encodable(where: str, column: str, text: str) -> str:
    """`text` as it is. Raises UserError where it holds half of a surrogate pair, which JSON can, and no tokenizer, file
    or request."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: {column!r} holds {text[error.start]!a}, half of a character") from None
    return text


def _split_common(row: Row, given: list[Any]) -> tuple[Any, list[Any]]:
    """The implicit prompt: what two whole conversations, or two texts (to the last whole word), have in common."""
    if all(isinstance(x, str) for x in given):
        same = "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*given, strict=False)))
        common: Any = re.sub(r"\S*\Z", "", same).rstrip()
        parts: list[Any] = [x[len(common) :] for x in given]
    else:
        chosen, rejected = (_messages(row, c, x) for c, x in zip(("chosen", "rejected"), given, strict=True))
        if chosen[:-1] != rejected[:-1]:
            raise UserError(f"{row.where}: 'chosen' and 'rejected' differ before their last message")
        common, parts = chosen[:-1], [chosen[-1:], rejected[-1:]]
    if not common:
        raise UserError(f"{row.where}: no prompt column, and 'chosen' and 'rejected' have no beginning in common")
    return common, parts


def _parse_transcripts(row: Row, config: DataConfig) -> tuple[Content, tuple[str, ...]]:
    """hh-rlhf: whole dialogues under chosen and rejected, or one that ends with "Assistant:" in the prompt column."""
    if config.prompt_column in row.values:
        return _content(row, config.prompt_column, _transcript(row, config.prompt_column)), ()
    prompt, parts = _split_common(row, [_transcript(row, "chosen"), _transcript(row, "rejected")])
    chosen, rejected = (_completion(row, c, x) for c, x in zip(("chosen", "rejected"), parts, strict=True))
    return _content(row, "chosen", prompt), (chosen, rejected)


def _transcript(row: Row, column: str) -> list[Message]:
    text = _value(row, column)
    if not isinstance(text, str):
        raise UserError(f"{row.where}: {column!r} must be a transcript, got {_kind(text)}")
    parts = re.split(r"(?:\A|\n\n)(Human|Assistant):", text)
    roles = {"Human": "user", "Assistant": "assistant"}
    messages = [{"role": roles[r], "content": c.strip()} for r, c in zip(parts[1::2], parts[2::2], strict=True)]
    if parts[0].strip() or not messages:
        raise UserError(f"{row.where}: {column!r} must begin with 'Human:' or 'Assistant:' on a paragraph of its own")
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else messages


def _prompt(row: Row, content: Content, config: DataConfig) -> Prompt:
    if config.chat and isinstance(content, str):
        content = ({"role": "user", "content": content},)
    if config.system_prompt and not isinstance(content, str) and content[0]["role"] != "system":
        content = ({"role": "system", "content": config.system_prompt}, *content)
    columns = {k: v for k, v in row.values.items() if k != config.prompt_column}
    return Prompt(str(row.values.get("id", row.default_id)), content, columns)


def _kind(value: Any) -> str:
    return "nothing (null)" if value is None else f"a value of type {type(value).__name__}"
