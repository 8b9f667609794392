"""Labels that were bought are never bought again: one SQLite file of judges' replies, keyed by content.

Only replies that gave a label are kept. The key is the endpoint's model name, the messages, the sampling settings, the
rubric and the sample's number, but not the base URL: the same model served elsewhere gives the same label. (Servers
that answer to a nickname such as "default" need a cache file of their own.)
"""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dualign.common.errors import UserError

SCHEMA = """
CREATE TABLE IF NOT EXISTS reply (
  key TEXT PRIMARY KEY, model TEXT NOT NULL, rubric TEXT NOT NULL, request TEXT NOT NULL, reply TEXT NOT NULL,
  prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, picodollars INTEGER NOT NULL,
  created REAL NOT NULL, hits INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID
"""


def default_path() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dualign" / "labels.sqlite"


def canonical(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def key_of(content: str) -> str:
    """sha256 of the canonical JSON of everything that decides a reply."""
    return hashlib.sha256(content.encode()).hexdigest()


def connect(path: Path | str, schema: str) -> sqlite3.Connection:
    """A database that several processes share and that a kill -9 leaves whole: every statement is its own transaction
    (isolation_level None), written ahead (WAL). Raises UserError when the file cannot be used."""
    try:
        if path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        db.executescript(schema)
    except (sqlite3.Error, OSError) as error:
        raise UserError(f"{path}: cannot be opened as a SQLite file: {error}") from None
    return db


@dataclass(frozen=True)
class Row:
    key: str
    model: str
    rubric: str
    request: str  # canonical JSON
    reply: Mapping[str, Any]


class Cache:
    def __init__(self, path: Path | str) -> None:
        self._db = connect(path, SCHEMA)

    def get(self, key: str) -> dict[str, Any] | None:
        row = self._db.execute("SELECT reply FROM reply WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def count_hit(self, key: str) -> None:
        self._db.execute("UPDATE reply SET hits = hits + 1 WHERE key = ?", (key,))

    def put(self, row: Row, tokens: tuple[int, int], picodollars: int, replace: bool = False) -> None:
        """Keeps the first reply where two processes bought the same, unless it is to `replace` one that could not be
        read any more. `tokens`: prompt, completion."""
        values = (row.key, row.model, row.rubric, row.request, canonical(row.reply), *tokens, picodollars, time.time())
        verb = "REPLACE" if replace else "IGNORE"
        self._db.execute(f"INSERT OR {verb} INTO reply VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 0)", values)

    def summary(self) -> list[dict[str, Any]]:
        """Per model and rubric: labels kept, and the calls, tokens and dollars that asking again did not cost."""
        rows = self._db.execute(
            "SELECT model, rubric, count(*), sum(hits), sum(hits * (prompt_tokens + completion_tokens)), "
            "sum(hits * picodollars) FROM reply GROUP BY model, rubric ORDER BY model, rubric"
        )
        names = ("model", "rubric", "labels", "saved_calls", "saved_tokens", "saved_dollars")
        return [dict(zip(names, (*row[:5], row[5] / 1e12), strict=True)) for row in rows]

    def rows(self) -> Iterator[dict[str, Any]]:
        """Every reply with its request, oldest first."""
        names = ("key", "model", "rubric", "request", "reply", "prompt_tokens", "completion_tokens", "created", "hits")
        for row in self._db.execute(f"SELECT {', '.join(names)} FROM reply ORDER BY created, key"):
            record = dict(zip(names, row, strict=True))
            yield {**record, "request": json.loads(record["request"]), "reply": json.loads(record["reply"])}

    def close(self) -> None:
        self._db.close()
