"""What can go wrong with one attempt at a request, sorted by what to do about it."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from dualign.annotate.settings import Endpoint

TOO_LONG = re.compile(r"context[ _]length|maximum.{0,20}(?:length|context)|too (?:long|many tokens)|input length", re.I)
FILTERED = re.compile(r"content[ _](?:filter|policy|management)|safety", re.I)
NO_CREDIT = re.compile(r"insufficient_quota|billing|exceeded your current quota|payment", re.I)


class MalformedError(Exception):
    """A payload that is no answer: not an object, no choices, no text."""


@dataclass
class AttemptError(Exception):
    """`str()` is for people and never holds the key. Neither passing nor lasting: only this request is at fault."""

    message: str
    passing: bool = False  # may be gone at the next attempt
    lasting: bool = False  # every request would fail alike: stop
    down: bool = False  # a passing fault that a server out of order shows
    suspect: bool = False  # this request's fault, unless no request was ever accepted
    turned_away: bool = False  # the server said no: nothing was billed
    wait: float | None = None  # seconds that the server asked for (Retry-After)

    def __str__(self) -> str:
        return self.message


def of_exception(error: Exception, key: str, settings: Endpoint) -> AttemptError | None:
    """What the network and the server did; None for anything else (a mistake of ours)."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return _of_status(error, key, settings)
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return AttemptError(f"no answer within {settings.timeout:g} s", passing=True)
    if isinstance(error, openai.APIConnectionError):
        refused = isinstance(error.__cause__, Exception) and "connect" in type(error.__cause__).__name__.lower()
        what = "cannot connect" if refused else "the connection was cut"
        return AttemptError(what, passing=True, down=True, turned_away=refused)
    if isinstance(error, (MalformedError, json.JSONDecodeError, UnicodeDecodeError, openai.APIError)):
        return AttemptError(f"malformed reply: {_clean(str(error), key)}", passing=True)
    return None


def _of_status(error: Any, key: str, settings: Endpoint) -> AttemptError:
    status = error.status_code
    said = _clean(re.sub(r"^Error code: \d+ - ", "", str(error.message)), key)
    where = f"{settings.model} at {re.sub(r'//[^/@]*@', '//', settings.base_url)}"
    if status == 402 or (status == 429 and NO_CREDIT.search(str(error.body))):
        return AttemptError(
            f"{where}: the account has no credit left ({status}: {said})", lasting=True, turned_away=True
        )
    if status in (408, 409, 425, 429) or status >= 500:
        down = status in (429, 502, 503, 504)
        wait = retry_after(error.response.headers.get("retry-after"))
        return AttemptError(f"HTTP {status}: {said}", passing=True, down=down, turned_away=True, wait=wait)
    if status in (401, 403):
        advice = f"put a valid key in the environment variable {settings.api_key_env}"
        return AttemptError(
            f"{where}: the server refuses the key (HTTP {status}); {advice}", lasting=True, turned_away=True
        )
    if status == 404:
        advice = "check `model` and `base_url` (most servers want it to end in /v1)"
        return AttemptError(f"{where}: not found (HTTP 404: {said}); {advice}", lasting=True, turned_away=True)
    if status == 413 or TOO_LONG.search(said):
        return AttemptError("the prompt is too long for the judge", turned_away=True)
    if FILTERED.search(str(error.body)):
        return AttemptError("refused by the provider's content filter", turned_away=True)
    return AttemptError(
        f"{where}: the server rejects the request (HTTP {status}: {said})", suspect=True, turned_away=True
    )


def retry_after(header: str | None) -> float | None:
    """Seconds to wait, from a number of seconds or an HTTP date; at most ten minutes."""
    if not header:
        return None
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        except (TypeError, ValueError):
            return None
    return min(max(seconds, 0.05), 600.0) if math.isfinite(seconds) else None


def _clean(text: str, key: str) -> str:
    """A server's words, short and without anything that looks like a key."""
    if key and key != "none":
        text = text.replace(key, "***")
    text = re.sub(r"(?i)\b(?:sk|pk|key|bearer)[-_ ][\w.*-]{6,}", "***", text)
    return re.sub(r"\s+", " ", text)[:300]
