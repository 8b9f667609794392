"""What can go wrong with one attempt at a request, sorted by what to do about it."""

from __future__ import annotations

import json
import math
import re
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from dualign.annotate.endpoints import Endpoint

TOO_LONG = re.compile(r"context[ _]length|maximum.{0,20}(?:length|context)|too (?:long|many tokens)|input length", re.I)
FILTERED = re.compile(
    r"content[ _-]?(?:filter|policy|management|exists risk)|moderation|flagged|data_inspection|ResponsibleAI|"
    r"^safety$|safety[ _-](?:system|filter|polic|setting|guideline|reason|check|violation|block)|"
    r"\b(?:for|due to|because of|blocked by) safety\b",
    re.I | re.M,
)
NO_CREDIT = re.compile(
    r"insufficient[_ ](?:quota|credit|balance|funds)|billing|exceeded your current quota|payment|credit balance|"
    r"out of credits|arrear",
    re.I,
)
FILTER = "refused by the provider's content filter"
RATE = re.compile(r"rate[ _-]?limit", re.I)
SPENT = re.compile(r"insufficient|exceeded your current quota|credit balance|out of credits|arrear", re.I)
QUOTED = re.compile(  # addresses too, and the input that validators send back
    r"`[^`]*`|\"[^\"]*\s[^\"]*\"|(?<!\w)'[^'\n]*\s[^'\n]*'(?!\w)|https?://\S+|"
    r"(?s:['\"]input['\"]\s*:.*|input_value=.*)"
)
MINIMAX = {  # the codes of its `base_resp`, as an HTTP status or a code of others
    1000: 503, 1001: 503, 1002: 429, 1004: 401, 1008: 402, 1013: 503, 1026: "content_filter", 1027: "content_filter",
    1039: 413, 2049: 401,
}  # fmt: skip
STATUS = {  # of an error that says in words only what an HTTP status would
    402: NO_CREDIT,
    400: FILTERED,
    413: TOO_LONG,
    401: re.compile(r"api[ _-]?key|authenti|unauthori[sz]ed", re.I),
    403: re.compile(r"permission|forbidden|access denied", re.I),
    429: re.compile(rf"{RATE.pattern}|too[ _]?many[ _]?requests|throttl", re.I),
    404: re.compile(r"not[ _]?found|does not exist|no such model|unknown model", re.I),
    503: re.compile(
        r"overload|unavailable|server[ _]?error|internal|time[d -]*out|capacity|try again|retry|temporar|upstream|"
        r"provider returned error|busy|bad gateway",
        re.I,
    ),
}


class MalformedError(Exception):
    """A payload that is no answer: not an object, no choices, no text."""


@dataclass
class NoAnswerError(Exception):
    """A reply that holds no answer, and would hold none if it were asked for again: a content filter, a refusal,
    reasoning alone. `str()` is the reason of the absent label, `words` what the judge said."""

    reason: str
    words: str | None = None

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class Refusal:
    """A server's words against a request, and the field that it names as the wrong one."""

    words: str
    param: str | None


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
    too_long: bool = False  # the prompt and the reply that is asked for do not fit into the judge's context
    refusal: Refusal | None = None  # of how the request is put, maybe

    def __str__(self) -> str:
        return self.message


def of_exception(error: Exception, key: str, settings: Endpoint) -> AttemptError | None:
    """What the network and the server did; None for anything else (a mistake of ours)."""
    import openai

    if isinstance(error, AttemptError):
        return error
    if isinstance(error, openai.APIStatusError):
        said = re.sub(r"^Error code: \d+ - ", "", str(error.message))
        wait = retry_after(error.response.headers.get("retry-after"))
        return of_answer(error.status_code, error.body, said, key, settings, wait)
    if isinstance(error, (TimeoutError, openai.APITimeoutError)):
        return AttemptError(f"no answer within {settings.timeout:g} s", passing=True)
    if isinstance(error, openai.APIConnectionError):
        refused = isinstance(error.__cause__, Exception) and "connect" in type(error.__cause__).__name__.lower()
        what = "cannot connect" if refused else "the connection was cut"
        return AttemptError(what, passing=True, down=True, turned_away=refused)
    if isinstance(error, (MalformedError, json.JSONDecodeError, UnicodeDecodeError, openai.APIError)):
        return AttemptError(f"malformed reply: {_clean(str(error), key)}", passing=True)
    return None


def _bare(body: Any) -> Any:
    """An error without what it is wrapped in: Gemini's stands in a list."""
    body = body[0] if isinstance(body, list) and body and isinstance(body[0], dict) else body
    return body["error"] if isinstance(body, dict) and isinstance(body.get("error"), dict) else body


def _refusal(error: Any, model: str = "") -> Refusal:
    """Without what is not the server's own: the request, sent back by a validator or quoted, the model's name, and lists
    of what it does take."""
    fields = error if isinstance(error, dict) else {}
    inner = fields["message"] if isinstance(fields.get("message"), dict) else fields
    detail = inner.get("detail")
    locs = [d.get("loc") for d in detail if isinstance(d, dict)] if isinstance(detail, list) else []
    places = [part for loc in locs if isinstance(loc, list | tuple) for part in loc if part != "body"]
    param = fields.get("param") or (places[0] if places else None)
    words = re.split(r"['\"]input['\"]\s*:|input_value=|expected one of|[Ss]upported (?:values|parameters)|[Dd]id you mean",
                     _message_of(error))[0]  # fmt: skip
    words = re.sub(r"\"[^\"]*\s[^\"]*\"|(?<!\w)'[^'\n]*\s[^'\n]*'(?!\w)", " ", words)
    words = re.sub(rf"(?<![\w-]){re.escape(model)}(?![\w-])", " ", words) if model else words
    return Refusal(words[:1000], param if isinstance(param, str) else None)


def of_answer(
    status: int, body: Any, said: str, key: str, settings: Endpoint, wait: float | None = None
) -> AttemptError:
    """What a server says no with: an HTTP status, its error object and all of its words."""
    body = _bare(body) or said
    fault = _of_status(status, f"HTTP {status}", _clean(said, key), _own_words(body, settings.model), settings, wait)
    if fault.suspect or status == 403:
        fault.refusal = _refusal(body, settings.model)
    return fault


def of_payload(payload: Any, key: str, settings: Endpoint) -> AttemptError | None:
    """The fault of a reply that arrived as HTTP 200 and is no answer: an error object, a stream of events, a page."""
    if isinstance(payload, str) and payload.lstrip().startswith("data:"):
        what = "answers with a stream of events, which nobody asked for; a judge's server must answer in one piece"
        return AttemptError(f"{settings.model} at {shown_url(settings.base_url)}: the server {what}", suspect=True)
    if isinstance(payload, str) and payload.lstrip().startswith("<"):
        page = _clean(re.sub(r"<[^>]*>", " ", payload), key)[:80].strip()
        return AttemptError(f"malformed reply: a web page instead of JSON ({page}); is base_url right?", passing=True)
    if not isinstance(payload, dict):
        return AttemptError("malformed reply: the reply is not a JSON object", passing=True)
    error = _error_in(payload)
    if error is None:
        return None
    own = _own_words(error, settings.model)
    status, said = _status_of(error, own), _clean(_message_of(error), key)
    return _of_status(status, f"error {status} in an HTTP 200", said, own, settings, None, not payload.get("usage"))


def _error_in(payload: dict[str, Any]) -> Any:
    """The error that a reply or its first choice holds, in the forms that servers give it; None where there is none."""
    choices = payload.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    for found in (payload.get("error"), choice.get("error")):
        if _tells(found):
            return payload if found is True else found
    base = payload.get("base_resp")
    if isinstance(base, dict) and str(base.get("status_code") or 0) != "0":
        number = int(base["status_code"]) if str(base["status_code"]).isdecimal() else 0
        return {"code": MINIMAX.get(number, base["status_code"]), "message": base.get("status_msg")}
    bare = not ({"choices", "data"} & payload.keys()) and "code" in payload and _message_of(payload)
    return payload if payload.get("object") == "error" or bare else None


def _tells(error: Any) -> bool:
    """Whether an error says anything: one whose fields are all empty is none."""
    return any(map(_tells, error.values())) if isinstance(error, dict) else bool(error)


@dataclass(frozen=True)
class OwnWords:
    """What a server itself says of a fault: its codes and types, a line each, and its message, without the model's
    name, addresses and quoted text. Whatever else a body holds may be the request, sent back."""

    codes: str
    message: str

    def match(self, pattern: re.Pattern[str]) -> bool:
        return bool(pattern.search(self.codes) or pattern.search(self.message))

    @property
    def no_credit(self) -> bool:
        """Of a rate limit too, servers tell how a payment would raise it."""
        if RATE.search(self.codes):
            return False
        return self.match(SPENT if RATE.search(self.message) else NO_CREDIT)


def _own_words(error: Any, model: str) -> OwnWords:
    fields = error if isinstance(error, dict) else {}
    inner = [fields[name] for name in ("error", "innererror") if isinstance(fields.get(name), dict)]
    codes = [str(f[name]) for f in (fields, *inner) for name in ("code", "status", "type") if f.get(name)]
    message = " ".join(_message_of(f) for f in (error, *inner))
    name = "|".join(map(re.escape, (model, model.rsplit("/", 1)[-1])))
    return OwnWords("\n".join(codes), QUOTED.sub(" ", re.sub(rf"(?<![\w-])(?:{name})(?![\w-])", " ", message)))


def _status_of(error: Any, own: OwnWords) -> int:
    """The HTTP status that an error object stands for: its own number, else by its codes, else by its message; 400
    where they say nothing."""
    fields = error if isinstance(error, dict) else {}
    for name in ("code", "status", "status_code", "http_code"):
        number = str(fields.get(name))
        if re.fullmatch(r"[45]\d\d", number):
            return int(number)
    for words in (own.codes, own.message):
        for status, pattern in STATUS.items():
            if pattern.search(words) and (status != 402 or own.no_credit):
                return status
    return 400


def _message_of(error: Any) -> str:
    if not isinstance(error, dict):
        return str(error)
    found = next((error[name] for name in ("message", "msg", "detail") if error.get(name)), "")
    if isinstance(found, list):  # what is wrong with each field, which may stand beside it
        found = "; ".join(_message_of(each) for each in found)
    return _message_of(found) if isinstance(found, dict) else str(found)


def _of_status(
    status: int, shown: str, said: str, own: OwnWords, settings: Endpoint, wait: float | None, unbilled: bool = True
) -> AttemptError:
    """`shown`: the status for people; `said`: all that the server sent, cleaned; `own`: the words that tell the fault."""
    where = f"{settings.model} at {shown_url(settings.base_url)}"

    def fault(message: str, **kind: Any) -> AttemptError:
        return AttemptError(message, turned_away=unbilled, **kind)

    if status == 402 or (status in (400, 403, 429) and own.no_credit):
        return fault(f"{where}: the account has no credit left ({status}: {said})", lasting=True)
    if status in (408, 409, 425, 429) or status >= 500:
        return fault(f"{shown}: {said}", passing=True, down=status in (429, 502, 503, 504), wait=wait)
    if status in (400, 403) and own.match(FILTERED) and not own.match(TOO_LONG):
        return fault(FILTER)
    if status in (401, 403):
        advice = f"put a valid key in the environment variable {settings.api_key_env}"
        return fault(f"{where}: the server refuses the key ({shown}); {advice}", lasting=True)
    if status == 404:
        advice = "check `model` and `base_url` (most servers want it to end in /v1)"
        return fault(f"{where}: not found ({shown}: {said}); {advice}", lasting=True)
    if status == 413 or own.match(TOO_LONG):
        return fault("the prompt is too long for the judge", too_long=True)
    if own.match(FILTERED):
        return fault(FILTER)
    return fault(f"{where}: the server rejects the request ({shown}: {said})", suspect=True)


def shown_url(base_url: str) -> str:
    """A URL without the name and password that it may hold."""
    return re.sub(r"//[^/@]*@", "//", base_url)


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
