"""Prompts and fixed completions from files and data sets: rows of any Hugging Face layout -> Prompt, Example.

Layouts are Hugging Face TRL's (docs "Dataset formats and types"): prompt-only, prompt-completion and preference, each
plain (text) or conversational (a list of messages); whole conversations under `messages`; and hh-rlhf's transcripts
("\\n\\nHuman: ...").
"""

from __future__ import annotations

import csv
import difflib
import gzip
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from dualign.common.errors import UserError
from dualign.common.paths import path_of
from dualign.common.types import TEMPLATE_COLUMNS, Example, Finish, Message, Prompt, text_of
from dualign.data.conversation import as_json, kind_of, without_nulls
from dualign.data.layouts import Row, layout_of, parse, prompt_of
from dualign.data.settings import DataConfig

log = logging.getLogger(__name__)

FILE_SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
X = TypeVar("X")


def load_prompts(source: str, config: DataConfig | None = None, split: str | None = None) -> list[Prompt]:
    """The prompts of `source`, in its order; completions it may hold stay in `columns` with every other column.

    `source` is a local file, builtin:NAME[/SPLIT[/KIND]], a folder or a data set's name; `split` (default: config.split)
    counts for the last three. Raises UserError naming the file, the row and the column.
    """
    config = config or DataConfig(train=source)
    rows, layout = read_rows(source, config, split)
    return [example.prompt for example in _examples(source, rows, layout, config, prompts_only=True)]


def lost_system_prompt(prompts: Sequence[Prompt], config: DataConfig) -> bool:
    """Whether the system prompt reaches no model: every prompt is plain text, which is asked as it is."""
    return bool(config.system_prompt and prompts) and not any(prompt.conversational for prompt in prompts)


def load_examples(source: str, config: DataConfig | None = None, split: str | None = None) -> list[Example]:
    """The rows of a preference set, completions = (chosen, rejected), or of demonstrations, completions =
    (completion,), in its order. Raises UserError as load_prompts, and where rows hold prompts only."""
    config = config or DataConfig(train=source)
    rows, layout = read_rows(source, config, split)
    if layout == "prompt" and config.format == "auto" and "messages" in rows[0].values:
        layout = "messages"
    if layout == "prompt":
        have = ", ".join(rows[0].values)
        raise UserError(
            f"{source}: needs chosen and rejected, or completion, or messages, in every row; its columns are {have}"
        )
    return list(_examples(source, rows, layout, config))


def draw(
    items: Sequence[X], limit: int | None, seed: int = 0, keep: Callable[[X], bool] = lambda item: True
) -> list[X]:
    """`limit` of the items that `keep` is true of, in their order, for one seed always the same ones: a draw, not the
    file's first rows. Another is drawn for one that is not kept; `keep` is asked of no more than it takes."""
    if limit is None or limit >= len(items):
        return [item for item in items if keep(item)]
    order = np.random.default_rng(seed).permutation(len(items)).tolist()
    return [items[i] for i in sorted(islice((i for i in order if keep(items[i])), limit))]


def _finish(row: Row, count: int) -> tuple[Finish, ...]:
    """How each completion ended, by the row's `finish` where it has one: "length" was cut off, and is not given the end
    that it never had."""
    given = row.values.get("finish")
    reasons = ["eos"] * count if given is None else [given] if isinstance(given, str) else given
    if not isinstance(reasons, list) or len(reasons) != count or any(r not in ("eos", "length") for r in reasons):
        what = "eos or length" if count == 1 else f"a list of {count}, each eos or length"
        raise UserError(f"{row.where}: finish: expected {what}, for how the completion ended; got {given!r}")
    return cast(tuple[Finish, ...], tuple(reasons))


def _examples(
    source: str, rows: list[Row], layout: str, config: DataConfig, prompts_only: bool = False
) -> Iterator[Example]:
    """Each row's prompt and completions. A row that is not of the layout stops it, or is left out and counted."""
    first: UserError | None = None
    skipped = several = unread = 0
    for row in rows:
        try:
            if layout == "completion" and not prompts_only and str(row.values.get("label")).lower() == "false":
                raise UserError(f"{row.where}: its 'label' is false: the completion is not one to learn from")
            content, answers = parse(row, layout, config, prompts_only)
            example = _example(row, prompt_of(row, content, config), [] if prompts_only else answers)
        except UserError as error:
            if config.bad_rows == "stop":
                raise UserError(f"{error} (data.bad_rows=skip leaves such rows out)") from None
            first, skipped = first or error, skipped + 1
            continue
        unread += not example.prompt.conversational and any(map(row.values.get, TEMPLATE_COLUMNS))
        several += layout in ("completion", "messages") and _several(row, example, config)
        yield example
    if skipped == len(rows):
        raise UserError(f"{source}: none of its {skipped:,} rows can be used; the first: {first}")
    if skipped:
        log.warning("%s: %s of %s rows left out; the first: %s", source, f"{skipped:,}", f"{len(rows):,}", first)
    if unread:
        what = "no template shows them to the model (data.chat=true makes a plain prompt a user's message)"
        log.warning("%s: %s of %s rows are plain text with tools: %s", source, f"{unread:,}", f"{len(rows):,}", what)
    if several:
        what = "the assistant's last turn is trained on, its earlier ones are context"
        log.warning("%s: %s of %s rows are longer conversations: %s", source, f"{several:,}", f"{len(rows):,}", what)


def _example(row: Row, prompt: Prompt, answers: list[str | Message]) -> Example:
    texts = tuple(x if isinstance(x, str) else text_of(x) for x in answers)
    turns = tuple(x for x in answers if not isinstance(x, str))
    return Example(prompt, texts, _finish(row, len(texts)) if texts else (), turns)


def _several(row: Row, example: Example, config: DataConfig) -> bool:
    """Whether turns of the assistant that were given to be trained on are context now."""
    own, whole = (row.values.get(config.prompt_column), example.prompt.content) if example.completions else ("", "")
    before = own if isinstance(own, list) and config.prompt_column != "messages" else ()
    return _spoken(whole) > _spoken(before)


def _spoken(messages: Any) -> int:
    return sum(m["role"] == "assistant" for m in messages) if not isinstance(messages, str) else 0


# ---- rows of a source ------------------------------------------------------------------------------------------------


def read_rows(source: str, config: DataConfig, split: str | None = None) -> tuple[list[Row], str]:
    """All rows, and their layout: that of the first row where the format is "auto"."""
    rows = list(_rows(source, config, split or config.split))
    if not rows:
        raise UserError(f"{source}: holds no rows")
    return rows, layout_of(rows[0].values, config) if config.format == "auto" else config.format


def local_file(source: str, split: str = "train") -> Path | None:
    """The file that `source` names, there or not; None for a folder and for a data set's name. Raises UserError for
    builtin data that the package does not have."""
    if source.startswith("builtin:"):
        name, part, _ = _builtin(source, split)
        path = Path(str(files("dualign.data"))) / "prompts" / f"{name}_{part}.jsonl"
        if path.name != f"{name}_{part}.jsonl" or not path.is_file():  # no way out of the package
            have = ", ".join(f"builtin:{p.stem.replace('_', '/')}" for p in sorted(path.parent.glob("*.jsonl")))
            raise UserError(f"{source}: no such data in the package; it has {have or 'none'}")
        return path
    path = path_of(source)
    looks_local = source.endswith(FILE_SUFFIXES) or source.startswith((".", "/", "~"))
    return path if path.is_file() or (looks_local and not path.is_dir()) else None


def names_data(words: str) -> bool:
    """Whether they name a file, a folder or data of the package, there or not. Plain words with a slash or a dot in
    them do not."""
    if words.startswith("builtin:"):
        return True
    try:
        if path_of(words).exists():
            return True
    except (OSError, ValueError, RuntimeError):  # too long for a path; no such user
        return False
    return len(words.split()) == 1 and (words.endswith(FILE_SUFFIXES) or words.startswith(("./", "../", "/", "~/")))


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
        folder = path_of(source)
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
                raise UserError(f"{path}, row {number}: expected an object of columns, got {kind_of(values)}")
            yield Row(f"{path}, row {number}", f"{path.name}:{number}", values)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.object[error.start]:#x}): save it as UTF-8") from error
    except (OSError, EOFError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def _file_values(path: Path) -> Iterator[tuple[int, Any]]:
    """(row number from 1, value) of a file; a line's number in JSON Lines."""
    if path.name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            for number, values in enumerate(pq.read_table(path).to_pylist(), 1):
                yield number, _from_arrow(values)
        except pa.ArrowInvalid as error:
            raise UserError(f"{path}: not a readable Parquet file: {error}") from error
        return
    opened = gzip.open if path.name.endswith(".gz") else open
    with opened(path, "rt", encoding="utf-8-sig", newline="" if path.name.endswith(".csv") else None) as text:
        if path.name.endswith(".csv"):
            csv.field_size_limit(2**31 - 1)  # a text may be long
            reader = csv.DictReader(text, strict=True)
            if twice := [name for name, count in Counter(reader.fieldnames or ()).items() if name and count > 1]:
                raise UserError(f"{path}: its first line names the column {twice[0]!r} twice")
            for number, values in enumerate(reader, 1):
                if None in values or None in values.values():  # too many; too few
                    raise UserError(f"{path}, row {number}: not as many values as the first line names columns")
                yield number, values
        elif ".jsonl" in path.suffixes:
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
        yield Row(f"{name} [{split}], row {number}", f"{name}:{split}:{number}", _from_arrow(dict(values)))


def _from_arrow(values: dict[str, Any]) -> dict[str, Any]:
    """A row as JSON has it: messages and tools without the fields of other rows' messages and tools."""

    def padded(name: str, value: Any) -> bool:
        messages = isinstance(value, list) and any(isinstance(x, dict) and "role" in x for x in value)
        return messages or name in TEMPLATE_COLUMNS

    return {k: without_nulls(v) if padded(k, v) else v for k, v in as_json(values).items()}
