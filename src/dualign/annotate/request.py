"""What one request to a judge's server is: what it asks, at most how long, how soon, and what its reply counted."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dualign.annotate.budget import prompt_bound
from dualign.annotate.cache import canonical

Payload = Mapping[str, Any]
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds of back-off


@dataclass(frozen=True)
class Request:
    """One label to ask for. `rubric` and `sample` tell apart requests whose bodies are equal."""

    path: str  # "chat/completions", or an absolute URL
    body: Mapping[str, Any]  # as it is sent, without the model
    rubric: str = ""
    sample: int = 0
    wants: Mapping[str, Any] = field(default_factory=dict)  # what is spelled as the server takes it (`dialect`)
    room: int = 0  # tokens of a reply that a judge which thinks may have beyond `max_tokens`

    def content(self, model: str) -> str:
        """Canonical JSON of everything that decides the reply: the cache's key. The spelling is not part of it."""
        wants = {"wants": self.wants} if self.wants else {}
        return canonical({**self.body, **wants, "model": model, "rubric": self.rubric, "sample": self.sample,
                          "path": self.path.rsplit("/", 1)[-1]})  # fmt: skip

    def bounds(self) -> tuple[int, int]:
        """The most prompt and completion tokens that it can take."""
        messages = self.body.get("messages", [])
        texts = [m["content"] if m.keys() == {"role", "content"} else canonical(m) for m in messages]
        texts = texts or [self.body.get("input", "")]
        more = {key: value for key, value in self.body.items() if key not in ("messages", "input")}
        asked = [canonical(self.wants[name]) for name in ("schema", "choice") if name in self.wants]  # servers show it
        return prompt_bound([*texts, *asked, *([canonical(more)] if more else [])]), int(
            self.wants.get("max_tokens", 0)
        )

    def roomy(self) -> Request:
        return replace(self, wants={**self.wants, "max_tokens": self.room}) if self.room else self


class Pace:
    """At most `per_minute` of something, evenly spread; None: no limit."""

    def __init__(self, per_minute: int | None) -> None:
        self._seconds = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def take(self, amount: float = 1) -> None:
        if not self._seconds:
            return
        now = asyncio.get_running_loop().time()
        start = max(now, self._next)
        self._next = start + amount * self._seconds
        await asyncio.sleep(start - now)

    def give_back(self, amount: float) -> None:
        self._next -= amount * self._seconds


def parsed(text: str) -> Any:
    """A reply's JSON; its text where it is none, whatever its headers call it."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def backoff(tries: int) -> float:
    """Seconds before the next attempt: doubled each time, with jitter so that clients do not come back together."""
    return min(LONGEST_WAIT, FIRST_WAIT * 2 ** max(0, tries - 1)) * random.uniform(0.5, 1.0)


def usage(payload: Payload) -> tuple[int, int] | None:
    """Prompt and completion tokens as the server counted them; None where it did not, or not in whole numbers. What it
    says of prompts alone (a reward model writes nothing) is taken."""
    counts = payload.get("usage")
    if not isinstance(counts, dict):
        return None
    found = [counts.get("prompt_tokens"), counts.get("completion_tokens", 0), counts.get("total_tokens", 0)]
    if any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in found):
        return None
    prompt, completion, total = found
    return prompt, max(completion, total - prompt)  # Gemini and Grok count what is thought in the total alone
