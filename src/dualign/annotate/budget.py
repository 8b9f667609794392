"""Ceilings in dollars, tokens and calls that are never passed, not even by what is in flight.

Before a request is sent, the most that it can cost is set aside; the server's own count settles it afterwards. The
account is one row of a SQLite file that all processes of a run share, and granting is one UPDATE that holds only
while every ceiling does: there is no moment between looking and taking. A process that dies leaves what it had set
aside in the account, counted as spent. Money is counted in whole picodollars (1e-12 $), so sums are exact.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from dualign.annotate.cache import connect
from dualign.annotate.endpoints import SPENT, Endpoint
from dualign.common.errors import UserError

SCHEMA = """
CREATE TABLE IF NOT EXISTS account (
  name TEXT PRIMARY KEY, calls INTEGER NOT NULL DEFAULT 0, prompt_tokens INTEGER NOT NULL DEFAULT 0,
  completion_tokens INTEGER NOT NULL DEFAULT 0, picodollars INTEGER NOT NULL DEFAULT 0,
  held_tokens INTEGER NOT NULL DEFAULT 0, held_picodollars INTEGER NOT NULL DEFAULT 0
)
"""
COLUMNS = ("calls", "prompt_tokens", "completion_tokens", "picodollars")
TOKENS_PER_REQUEST = 64  # a chat template's own words, a default system prompt included
TOKENS_PER_MESSAGE = 16  # its role markers
UNLIMITED = 2**62


def prompt_bound(texts: list[str]) -> int:
    """The most prompt tokens that messages with these texts can be: a tokenizer makes at most one token of a byte."""
    return TOKENS_PER_REQUEST + sum(TOKENS_PER_MESSAGE + len(text.encode()) for text in texts)


@dataclass(frozen=True)
class Spent:
    """What a run has spent on one model. `held`: set aside for requests in flight, or lost with a killed process."""

    calls: int
    prompt_tokens: int
    completion_tokens: int
    dollars: float
    held_tokens: int
    held_dollars: float


@dataclass(frozen=True)
class Hold:
    tokens: int
    picodollars: int


def account(path: Path) -> tuple[int, ...]:
    """What a run's file says was bought, of all models together: COLUMNS; zeros where there is no such file. Raises
    sqlite3.Error for one that cannot be read."""
    if not path.is_file():
        return (0,) * len(COLUMNS)
    with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as db:
        sums = ", ".join(f"coalesce(sum({column}), 0)" for column in COLUMNS)
        return tuple(db.execute(f"SELECT {sums} FROM account").fetchone())


def paid(run_dir: Path) -> dict[str, float]:
    """For a line of metrics.jsonl: the dollars that a run has paid by now; nothing where nothing was to be paid."""
    with contextlib.suppress(sqlite3.Error):
        if picodollars := account(run_dir / SPENT)[-1]:
            return {"dollars": picodollars / 1e12}
    return {}


class Ledger:
    """One model's account, wherever it is served: another address is no new budget. `path` None: in memory, for this
    process alone."""

    def __init__(self, path: Path | None, settings: Endpoint) -> None:
        if settings.max_dollars is not None and not settings.price_prompt and not settings.price_completion:
            raise UserError(
                "max_dollars: without price_prompt and price_completion nothing costs anything, and it would never stop "
                "anything; set them, or max_tokens_total or max_calls"
            )
        self.name = settings.model
        self._prices = math.ceil(settings.price_prompt * 1e6), math.ceil(settings.price_completion * 1e6)
        self._ceilings = (
            UNLIMITED if settings.max_calls is None else settings.max_calls,
            UNLIMITED if settings.max_tokens_total is None else settings.max_tokens_total,
            UNLIMITED if settings.max_dollars is None else math.floor(settings.max_dollars * 1e12),
        )
        self._db = connect(path or ":memory:", SCHEMA)
        self._db.execute("INSERT OR IGNORE INTO account (name) VALUES (?)", (self.name,))

    def price(self, prompt_tokens: int, completion_tokens: int) -> int:
        return prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]

    def hold(self, prompt_tokens: int, completion_tokens: int) -> Hold | None:
        """Sets aside the most that one call can cost; None when a ceiling leaves no room for it."""
        hold = Hold(prompt_tokens + completion_tokens, self.price(prompt_tokens, completion_tokens))
        calls, tokens, picodollars = self._ceilings
        done = self._db.execute(
            "UPDATE account SET calls = calls + 1, held_tokens = held_tokens + :t, "
            "held_picodollars = held_picodollars + :p WHERE name = :name AND calls < :max_calls "
            "AND prompt_tokens + completion_tokens + held_tokens + :t <= :max_tokens "
            "AND picodollars + held_picodollars + :p <= :max_p",
            {"t": hold.tokens, "p": hold.picodollars, "name": self.name,
             "max_calls": calls, "max_tokens": tokens, "max_p": picodollars},
        )  # fmt: skip
        return hold if done.rowcount == 1 else None

    def settle(self, hold: Hold, prompt_tokens: int, completion_tokens: int) -> None:
        """Replaces what was set aside by what the server counted; (0, 0) for a call that was turned away."""
        self._db.execute(
            "UPDATE account SET held_tokens = held_tokens - ?, held_picodollars = held_picodollars - ?, "
            "prompt_tokens = prompt_tokens + ?, completion_tokens = completion_tokens + ?, "
            "picodollars = picodollars + ? WHERE name = ?",
            (hold.tokens, hold.picodollars, prompt_tokens, completion_tokens,
             self.price(prompt_tokens, completion_tokens), self.name),
        )  # fmt: skip

    def undo(self, hold: Hold, calls: int) -> None:
        """Of what was set aside for so many calls that were never made."""
        self._db.execute(
            "UPDATE account SET calls = calls - ?, held_tokens = held_tokens - ?, "
            "held_picodollars = held_picodollars - ? WHERE name = ?",
            (calls, hold.tokens, hold.picodollars, self.name),
        )

    def spent(self) -> Spent:
        row = self._db.execute(
            "SELECT calls, prompt_tokens, completion_tokens, picodollars, held_tokens, held_picodollars "
            "FROM account WHERE name = ?", (self.name,)
        ).fetchone()  # fmt: skip
        return Spent(row[0], row[1], row[2], row[3] / 1e12, row[4], row[5] / 1e12)

    def reached(self) -> str:
        """For people: which ceilings there are and what stands against them."""
        now = self.spent()
        tokens = now.prompt_tokens + now.completion_tokens
        against = (
            ("max_calls", f"{now.calls:,} calls made", f"{self._ceilings[0]:,}"),
            ("max_tokens_total", f"{tokens:,} tokens spent, {now.held_tokens:,} set aside", f"{self._ceilings[1]:,}"),
            ("max_dollars", f"${now.dollars:.6f} spent, ${now.held_dollars:.6f} set aside",
             f"{self._ceilings[2] / 1e12:g}"),
        )  # fmt: skip
        parts = [
            f"{key} {top} ({have})"
            for (key, have, top), limit in zip(against, self._ceilings, strict=True)
            if limit < UNLIMITED
        ]
        return f"{self.name}: the next call could pass a ceiling: {'; '.join(parts)}"

    def close(self) -> None:
        self._db.close()
