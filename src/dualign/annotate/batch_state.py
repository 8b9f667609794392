"""Which requests are in which batch, and what became of them: a SQLite file that a kill leaves whole. No keys to
servers in it. The account of what was spent (`budget.py`) may stand beside, in the same file."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualign.annotate.budget import Hold
from dualign.annotate.cache import connect
from dualign.common.errors import UserError

SCHEMA = """
CREATE TABLE IF NOT EXISTS batch (
  name TEXT PRIMARY KEY, model TEXT NOT NULL, rows INTEGER NOT NULL, planned REAL NOT NULL,
  file_id TEXT, batch_id TEXT, ended INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS request (
  key TEXT PRIMARY KEY, batch TEXT NOT NULL, line INTEGER NOT NULL, body TEXT NOT NULL,
  prompt INTEGER NOT NULL, completion INTEGER NOT NULL, picodollars INTEGER NOT NULL, outcome TEXT
)
"""


@dataclass(frozen=True)
class Asked:
    """A request of a batch. `body`: JSON, as it is sent; `hold`: what was set aside for it."""

    key: str
    body: str
    prompt: int
    completion: int
    hold: Hold

    @property
    def bounds(self) -> tuple[int, int]:
        return self.prompt, self.completion


@dataclass(frozen=True)
class Sent:
    """A batch. `name` is its own, and in its metadata at the server; ids as far as they are known."""

    name: str
    model: str
    rows: int
    planned: float
    file_id: str | None = None
    batch_id: str | None = None


class State:
    """Used by one command at a time. Raises UserError where another one has it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._db = connect(path, SCHEMA)
        self._lock_path = path.with_name(f".{path.name}.lock")
        self._lock = open(self._lock_path, "a")  # noqa: SIM115  (held until `close`)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{path}: another command is waiting for these batches") from None

    def plan(self, name: str, model: str, asked: Sequence[Asked]) -> Sent:
        sent = Sent(name, model, len(asked), time.time())
        rows = [(a.key, name, n, a.body, *a.bounds, a.hold.picodollars) for n, a in enumerate(asked)]
        with self._whole():
            self._db.execute("INSERT INTO batch (name, model, rows, planned) VALUES (?, ?, ?, ?)",
                             (name, model, sent.rows, sent.planned))  # fmt: skip
            self._db.executemany("INSERT INTO request VALUES (?, ?, ?, ?, ?, ?, ?, NULL)", rows)
        return sent

    def uploaded(self, sent: Sent, file_id: str) -> Sent:
        self._db.execute("UPDATE batch SET file_id = ? WHERE name = ?", (file_id, sent.name))
        return replace(sent, file_id=file_id)

    def created(self, sent: Sent, batch_id: str) -> None:
        self._db.execute("UPDATE batch SET batch_id = ? WHERE name = ?", (batch_id, sent.name))

    def ended(self, sent: Sent, outcomes: Mapping[str, Mapping[str, Any]]) -> Hold:
        """Keeps what became of a batch's requests, and returns what had been set aside for them."""
        with self._whole():
            self._db.executemany("UPDATE request SET outcome = ? WHERE key = ? AND batch = ?",
                                 ((json.dumps(o), key, sent.name) for key, o in outcomes.items()))  # fmt: skip
            self._db.execute("UPDATE batch SET ended = 1 WHERE name = ?", (sent.name,))
        return self._held(sent)

    def forget(self, sent: Sent) -> Hold:
        """Of a batch that was not begun; returns what had been set aside."""
        hold = self._held(sent)
        with self._whole():
            self._db.execute("DELETE FROM request WHERE batch = ?", (sent.name,))
            self._db.execute("DELETE FROM batch WHERE name = ?", (sent.name,))
        return hold

    def drop(self, key: str) -> None:
        self._db.execute("DELETE FROM request WHERE key = ?", (key,))

    def forget_ended(self) -> list[Sent]:
        """What is on its way stays, and is returned."""
        with self._whole():
            self._db.execute("DELETE FROM request WHERE batch IN (SELECT name FROM batch WHERE ended)")
            self._db.execute("DELETE FROM batch WHERE ended")
        return self.running()

    def running(self) -> list[Sent]:
        return self._sent("NOT ended ORDER BY planned")

    def unknown(self, model: str) -> list[Sent]:
        """Planned, and maybe made: nobody has written down its id."""
        return self._sent("batch_id IS NULL AND model = ?", model)

    def keys(self, name: str | None = None) -> set[str]:
        """Of the requests that are in a batch, or in this one."""
        where, values = ("WHERE batch = ?", (name,)) if name else ("", ())
        return {row[0] for row in self._db.execute(f"SELECT key FROM request {where}", values)}

    def asked(self, name: str) -> list[Asked]:
        rows = self._db.execute("SELECT key, body, prompt, completion, picodollars FROM request WHERE batch = ? "
                                "ORDER BY line", (name,))  # fmt: skip
        return [Asked(key, body, p, c, Hold(p + c, pico)) for key, body, p, c, pico in rows]

    def lines(self, name: str) -> list[str]:
        """Of a batch's input file."""
        parts = '{"custom_id": "%s", "method": "POST", "url": "/v1/chat/completions", "body": %s}'
        return [parts % (asked.key, asked.body) for asked in self.asked(name)]

    def outcomes(self, keys: Iterable[str]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Of those that have come back: the body that was sent, and what became of it."""
        wanted = set(keys)
        rows = self._db.execute("SELECT key, body, outcome FROM request WHERE outcome IS NOT NULL")
        return {key: (body, json.loads(outcome)) for key, body, outcome in rows if key in wanted}

    def close(self, remove: bool) -> None:
        """Where nothing is left that a later command needs, the file goes too."""
        self._db.close()
        self._lock.close()
        if remove:
            parts = [self.path.with_name(self.path.name + end) for end in ("", "-wal", "-shm")]
            for part in (*parts, self._lock_path):
                part.unlink(missing_ok=True)

    def _sent(self, where: str, *values: Any) -> list[Sent]:
        rows = self._db.execute(
            f"SELECT name, model, rows, planned, file_id, batch_id FROM batch WHERE {where}", values
        )
        return [Sent(*row) for row in rows]

    def _held(self, sent: Sent) -> Hold:
        row = self._db.execute("SELECT sum(prompt + completion), sum(picodollars) FROM request WHERE batch = ?",
                               (sent.name,)).fetchone()  # fmt: skip
        return Hold(row[0] or 0, row[1] or 0)

    def _whole(self) -> _Whole:
        return _Whole(self._db)


class _Whole:
    """All statements within, or none."""

    def __init__(self, db: Any) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *error: object) -> None:
        self._db.execute("ROLLBACK" if kind else "COMMIT")
