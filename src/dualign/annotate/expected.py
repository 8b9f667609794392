"""The expected score: Σ score · p(score) by the log-probs of the token where a judge wrote its score."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

ANSWER = re.compile(r"\"score\"\s*:\s*(?=\d)")
MASS = 0.5  # that the scores must have of a token in a free reply
GUIDED = 0.02  # and in one that the server held to them: what else the model would have said is no answer


def expected_score(
    tokens: Sequence[Mapping[str, Any]], written: float, low: float, high: float, guided: bool = False
) -> float | None:
    """Over the integers in low..high; None where the server gave no log-probs, where the number stands in several places
    and none of them is the reply's own (its JSON's "score", or its beginning), or where a token "1" may be the start of
    "10" and nothing tells how often it was. `guided`: the server could write nothing but a score there."""
    if written != int(written) or high - low < 2:  # "0" may be the start of "0.5"
        return None
    at = _place(tokens, int(written))
    if at is None or not _whole(tokens, at, int(written)):
        return None
    mass: dict[int, float] = {}
    for candidate in tokens[at].get("top_logprobs") or []:
        number = _integer(candidate["token"])
        if number is not None and low <= number <= high:
            mass[number] = mass.get(number, 0.0) + math.exp(candidate["logprob"])
    if int(high) >= 10 and int(high) not in mass and mass.get(1, 0.0) > 0.001:  # digit by digit
        if high != 10 or written not in (1, 10):
            return None
        ten = _continued(tokens[at + 1]) if at + 1 < len(tokens) else None
        if ten is None:
            return None
        mass[1], mass[10] = mass[1] * (1 - ten), mass[1] * ten
    total = math.fsum(mass.values())
    enough = total > (GUIDED if guided else MASS)
    return math.fsum(number * p for number, p in mass.items()) / total if enough else None


def _place(tokens: Sequence[Mapping[str, Any]], written: int) -> int | None:
    """Where the score was written: the index of its first token."""
    texts = [token["token"] for token in tokens]
    whole = "".join(texts)
    if whole.lstrip("` \njson").startswith("{"):
        stated = list(ANSWER.finditer(whole))
        return _covering(texts, stated[0].end()) if len(stated) == 1 else None
    said = {written, 1} if written == 10 else {written}
    at = [i for i, text in enumerate(texts) if _integer(text) in said]
    first = next((i for i, text in enumerate(texts) if text.strip()), None)
    return None if not at or (len(at) > 1 and at[0] != first) else at[0]


def _whole(tokens: Sequence[Mapping[str, Any]], at: int, written: int) -> bool:
    """Whether the number at that token, with what follows it, is the one that was read from the reply."""
    number = re.match(r"\D*(\d+(?:\.\d+)?)", "".join(token["token"] for token in tokens[at : at + 4]))
    one_token = _integer(tokens[at]["token"].rstrip("}], \n.")) == written
    split = written == 10 and _integer(tokens[at]["token"]) == 1
    return number is not None and float(number[1]) == written and (one_token or split)


def _covering(texts: Sequence[str], place: int) -> int:
    end = 0
    for index, text in enumerate(texts):
        end += len(text)
        if end > place:
            return index
    return len(texts) - 1


def _continued(token: Mapping[str, Any]) -> float | None:
    """How probable it is that a "1" goes on to "10": of the token after it."""
    top = token.get("top_logprobs") or []
    if not top:
        return None
    return math.fsum(math.exp(c["logprob"]) for c in top if re.match(r"0(?!\d)", c["token"]))


def _integer(token: str) -> int | None:
    match = re.fullmatch(r"[\s:*▁Ġ\"]*(\d{1,2})[\s*]*", token)
    return int(match[1]) if match else None
