"""What the page asks of completions: prompts found and sorted, one in full, held-out answers of several evaluations side
by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from dualign.common.errors import UserError, first_line
from dualign.eval.report.answers import Json
from dualign.eval.view import completions
from dualign.eval.view.completions import Completions
from dualign.eval.view.folders import MissingError
from dualign.eval.view.query import Query, parse
from dualign.eval.view.reading import Reader, Troubles

SORTS = ("order", *completions.SORTS, "gain", "loss")

Kind = Literal["batches", "evaluations"]


@dataclass(frozen=True)
class Column:
    """Held-out answers of one evaluation of one run."""

    run: str
    step: int
    path: Path


class Browser:
    def __init__(self, reader: Reader) -> None:
        self.reader, self.folders = reader, reader.folders
        self.completions = Completions()

    def listed(self, name: str, text: str, sort: str, offset: int, limit: int) -> Json:
        """Prompts of the online batches, some of them from `offset` on, in order. `total`: how many are found."""
        folder, query = self.folders.run(name), _asked(text, sort)
        troubles, files = Troubles(), []
        for step in self.reader.steps(folder, "batches"):
            if query.of_step(step) and (path := self._file(folder, "batches", step)):
                found = troubles.read(f"batches/{path.name}", partial(self.completions.index, path, query, sort))
                if found is not None:
                    files.append((step, path, found))
        step_G = np.repeat([f[0] for f in files], [len(f[2].start_G) for f in files])
        file_G = np.repeat(range(len(files)), [len(f[2].start_G) for f in files])
        start_G, count_G, key_G = (
            np.concatenate([getattr(f[2], part) for f in files]) if files else np.zeros(0)
            for part in ("start_G", "count_G", "key_G")
        )
        order = np.argsort(key_G, kind="stable") if sort != "order" else np.arange(len(key_G))
        items = []
        for g in order[offset : offset + limit]:
            path, start, count = files[int(file_G[g])][1], int(start_G[g]), int(count_G[g])
            shown = troubles.read(f"batches/{path.name}", partial(completions.light, path, start, count))
            items.append((shown or {}) | {"step": int(step_G[g]), "row": start})
        return {
            "total": len(order), "completions": int(count_G.sum()), "items": items, "troubles": list(troubles),
        }  # fmt: skip

    def heldout(self, columns: Sequence[str], text: str, sort: str, offset: int, limit: int) -> Json:
        """Prompts of the first of some evaluations, with the rewards in each."""
        asked, query, troubles = self._columns(columns), _asked(text, sort), Troubles()
        places = [self._places(column, parse(""), troubles) for column in asked]
        hits = [self._places(column, query, troubles) for column in asked]
        rows = []
        for at, (key, (start, count)) in enumerate(places[0].items()):
            if any(key in found for found in hits):
                where = [(start, count), *(found.get(key) for found in places[1:])]
                rows.append((self._rewards(asked, where) if sort != "order" else [], at, where))
        if sort != "order":
            rows.sort(key=lambda row: (_sort_key(row[0], sort), row[1]))
        items = []
        for _, _, where in rows[offset : offset + limit]:
            start, count = where[0] or (0, 0)  # the first has every prompt that is listed
            told = completions.light(asked[0].path, start, count)
            told["rewards"] = [[completions.answers.rounded(r) for r in rs] for rs in self._rewards(asked, where)]
            items.append(told | {"step": asked[0].step, "row": start})
        return {"total": len(rows), "completions": None, "items": items, "troubles": list(troubles)}

    def _places(self, column: Column, query: Query, troubles: Troubles) -> dict[tuple[str, int], tuple[int, int]]:
        """Where each prompt's answers stand: by its id, and the how-manieth of that id it is."""
        read = partial(self.completions.index, column.path, query, "order")
        found = troubles.read(column.path.name, read)
        if found is None:
            return {}
        ids = self._ids(column.path)
        return {ids[int(s)]: (int(s), int(c)) for s, c in zip(found.start_G, found.count_G, strict=True)}

    def _ids(self, path: Path) -> list[tuple[str, int]]:
        """Of each row. The same id is told apart by how many prompts had it before."""
        seen: dict[str, int] = {}
        found: list[tuple[str, int]] = []
        last: Any = None
        for table in completions.tables(path, {"group", "prompt_id"}):
            for row in table.to_pylist():
                if row["group"] != last:
                    seen[row["prompt_id"]] = seen.get(row["prompt_id"], -1) + 1
                    last = row["group"]
                found.append((row["prompt_id"], seen[row["prompt_id"]]))
        return found

    def _rewards(self, columns: Sequence[Column], where: Sequence[tuple[int, int] | None]) -> list[list[float]]:
        found = []
        for column, place in zip(columns, where, strict=True):
            read = completions.tables(column.path, {"reward"}, *place) if place is not None else ()
            values = [v for table in read for v in table["reward"].to_pylist()]
            found.append([math.nan if v is None else float(v) for v in values])
        return found

    def prompt(self, name: str, step: int, row: int, count: int) -> Json:
        """One prompt of an online batch with its K completions."""
        path = self._needed(self.folders.run(name), "batches", step)
        told = self._full(path, row, count)
        side = {"run": name, "kind": "batches", "step": step, "answers": told.pop("answers")}
        return told | {"sides": [side]}

    def held(self, columns: Sequence[str], row: int) -> Json:
        """One held-out prompt, by its row in the first evaluation, with its answers in each."""
        asked = self._columns(columns)
        with _reading(asked[0].path, row):
            key = self._ids(asked[0].path)[row]
        sides: list[Json] = []
        told: Json = {}
        for column in asked:
            place = self._places(column, parse(""), Troubles()).get(key)
            found = self._full(column.path, *place) if place else {"answers": []}
            side = {"run": column.run, "kind": "evaluations", "step": column.step, "answers": found.pop("answers")}
            sides.append(side)
            told = told or found
        return told | {"sides": sides}

    def text(self, name: str, kind: Kind, step: int, row: int, column: str, start: int) -> Json:
        """More of a long text."""
        path = self._needed(self.folders.run(name), kind, step)
        with _reading(path, row):
            return completions.piece(path, row, column, start)

    def _full(self, path: Path, row: int, count: int) -> Json:
        with _reading(path, row):
            return completions.full(path, row, count)

    def _columns(self, names: Sequence[str]) -> list[Column]:
        """Of `RUN@STEP`."""
        found = []
        for text in names:
            run, _, step = text.rpartition("@")
            if not (step.isascii() and step.isdecimal()):
                raise UserError("an evaluation is named RUN@BATCHES, as mine@40")
            found.append(Column(run, int(step), self._needed(self.folders.run(run), "evaluations", int(step))))
        if not found:
            raise UserError("which evaluation? Name one or more as RUN@BATCHES")
        return found

    def _needed(self, folder: Path, kind: Kind, step: int) -> Path:
        if (path := self._file(folder, kind, step)) is None:
            raise MissingError(f"{kind}/{step:06d}.parquet is not there, or leads out of the folder that is shown")
        return path

    def _file(self, folder: Path, kind: Kind, step: int) -> Path | None:
        return self.folders.file(folder / kind / f"{step:06d}.parquet")


@contextmanager
def _reading(path: Path, row: int) -> Iterator[None]:
    """Names the file where it has no such row, or is damaged."""
    name = f"{path.parent.name}/{path.name}"
    try:
        yield
    except IndexError:
        raise MissingError(f"{name}: it has no row {row}") from None
    except (pa.ArrowException, OSError) as error:
        raise OSError(f"{name}: {first_line(error)}") from None


def _asked(text: str, sort: str) -> Query:
    if sort not in SORTS:
        raise UserError(f"sort={sort}: one of {', '.join(SORTS)}")
    return parse(text)


def _sort_key(sides: Sequence[Sequence[float]], sort: str) -> float:
    """Of rewards in each evaluation; what is not known comes last."""
    every = [r for side in sides for r in side if not math.isnan(r)]
    means = [float(np.nanmean(side)) if np.isfinite(side).any() else math.nan for side in (sides[0], sides[-1])]
    gain = means[1] - means[0]
    if not every or (sort in ("gain", "loss") and math.isnan(gain)):
        return math.inf
    keys = {"best": -max(every), "worst": min(every), "spread": min(every) - max(every), "gain": -gain, "loss": gain}
    return keys.get(sort, 0.0)
