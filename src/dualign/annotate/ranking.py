"""From a judge's words to an order of K responses, by written rules. What is ambiguous is absent, never guessed.

A reply can state its ranking, best first,
  1. in JSON that is the whole reply, or its beginning or end: {"ranking": [2, 1, 3]}
  2. in a place of its own: a line ("2 > 1 > 3", "Ranking: [2, 1, 3]", "2, 1, 3"), or one response per line, bare or as
     a list that is numbered from 1 ("1. Response 2 - clear"; "1. 2" may mean either, and is not read)
  3. in a formal statement within a text ("The ranking is 2 > 1 > 3, because ...")
  4. in the text itself: a chain of ">"
JSON decides alone; places and formal statements together; the text only where there are none. Each must name every
number from 1 to K once, and all that decide must agree. "=" is a tie ("2 > 1 = 3", "[2, [1, 3]]"). As for scores
(`extract`), what the judge reasons, quotes or repeats of the judged texts is not what it says.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from dualign.annotate import extract, statements

Tiers = tuple[tuple[int, ...], ...]  # the numbers best first; those of one tier tie

ITEM = rf"[\[(]*(?:{extract.THING}\s*)?\d+[\])]*"
ARROW, COMMA, TIE = r"\s*(?:>+|≻|->|→)\s*", r"\s*[,;]\s*", r"\s*=+\s*"
ARROWS = rf"{ITEM}(?:(?:{ARROW}|{TIE}){ITEM})+"
CHAIN = rf"(?P<chain>[\[(]*{ITEM}(?:(?:{ARROW}|{TIE}){ITEM})+[\])]*|[\[(]*{ITEM}(?:(?:{COMMA}|{TIE}){ITEM})+[\])]*)"
BEST_FIRST = r"(?:\(?\s*(?:from\s+)?best(?:\s+to\s+worst|\s+first)\s*\)?)"
LABEL = (
    rf"(?:(?:my|the|your|final|overall|preferred|correct)\s+)*(?:(?:ranking|rank|ranked|order(?:ing)?|answer)\b"
    rf"\s*(?:of the (?:responses|summaries|answers)\s*)?{BEST_FIRST}?|{BEST_FIRST})"
)
LINK = r"\s*(?:(?:is|would be|are)\b)?\s*[:=]*\s*"
REVERSED = re.compile(r"(?i)\bworst\s+(?:to\s+best|first)\b|\bleast\s+to\s+most\b|\bascending\b")
PLACE = re.compile(rf"(?im)^[^\w\n\[(<>=]*(?:{LABEL}{LINK})?{CHAIN}[^\w\n<>=,]*$")
FORMAL = re.compile(rf"(?i)\b{LABEL}{LINK}{CHAIN}(?!\s*[\w<>=,]*\d)")
PROSE = re.compile(rf"(?i)(?<![\w.<>=])(?<!\bor )(?P<chain>{ARROWS})(?!\s*(?:[<>=]|or\b))")
BARE_LINE = re.compile(rf"(?i)[^\w<>=]*(?:{extract.THING}\s*)?(\d+)[^\w<>=]*")
LISTED_LINE = re.compile(rf"(?im)^\W*(\d+)[.)]\s+{extract.THING}\s*(\d+)\b")
JSON = statements.Asked(
    keys=(re.compile(r"(?i)(?:(?:final|overall|my|the)\s+)*(?:ranking|ranked|order|ordering|best to worst)"),),
    value=re.compile(r"(?s).*"),
    label="ranking",
)


@dataclass(frozen=True)
class Ranking:
    tiers: Tiers | None
    reason: str | None = None  # why there is none


def ranking(reply: str, k: int, *, cut: bool = False, echoes: Sequence[str] = ()) -> Ranking:
    """The order of responses 1..k that `reply` states. `cut`: the server stopped at max_tokens. `echoes`: the texts
    that were judged and their prompt; a judge that repeats them is not speaking for itself."""
    whole, reason = statements.of_reply(reply, cut, echoes)
    if whole is not None:
        return _agreed(list(_of_json(whole)), k, "no ranking in the reply")
    own, reason = ("", reason) if reason else extract.own_words(reply, echoes)
    if reason:
        return Ranking(None, reason)
    if (block := _json(own, echoes)) is not None:
        return _agreed(list(_of_json(block)), k, "no ranking in the reply")
    text = extract.unquoted(re.sub(r"(?<=\d),(?=\d)", ", ", own))  # "4,5,1" holds no decimal
    if REVERSED.search(text):
        return Ranking(None, "ranked from worst to best")
    found = [*(_tiers(m["chain"]) for m in PLACE.finditer(text)), *_by_line(text), *_spoken(FORMAL, text)]
    return _agreed(found or list(_spoken(PROSE, text)), k, extract._why_nothing(text, cut, "no ranking in the reply"))


def _agreed(found: Sequence[Tiers | None], k: int, nothing: str) -> Ranking:
    if not found:
        return Ranking(None, nothing)
    for tiers in found:
        if reason := "the ranking cannot be read" if tiers is None else _fault(tiers, k):
            return Ranking(None, reason)
    if len({tuple(tuple(sorted(tier)) for tier in tiers or ()) for tiers in found}) > 1:
        return Ranking(None, "two different rankings")
    return Ranking(found[0])


def _fault(tiers: Tiers, k: int) -> str | None:
    numbers = [number for tier in tiers for number in tier]
    if any(not 1 <= number <= k for number in numbers):
        return "the ranking names a response that there is not"
    if len(set(numbers)) < len(numbers):
        return "the ranking names a response twice"
    return "the ranking leaves out a response" if len(numbers) < k else None


def _tiers(chain: str) -> Tiers:
    return tuple(
        tuple(int(number) for number in re.findall(r"\d+", tier)) for tier in re.split(rf"{ARROW}|{COMMA}", chain)
    )


def _spoken(pattern: re.Pattern[str], text: str) -> Iterator[Tiers]:
    """Within sentences, which may deny, suppose or report them."""
    for match in pattern.finditer(text):
        if not extract.DENIED.search(re.split(r"[.!?;]\s|\n", text[: match.start("chain")])[-1]):
            yield _tiers(match["chain"])


def _by_line(text: str) -> Iterator[Tiers | None]:
    """A list that is numbered 1, 2, 3, ...; or lines that hold a number each, and nothing else beside them."""
    listed = LISTED_LINE.findall(text)
    if len(listed) > 1:
        in_order = [int(place) for place, _ in listed] == list(range(1, len(listed) + 1))
        yield tuple((int(number),) for _, number in listed) if in_order else None
        return
    lines = [line for line in text.split("\n") if line.strip()]
    if lines and re.fullmatch(rf"(?i)\W*{LABEL}{LINK}\W*", lines[0]):
        lines = lines[1:]
    bare = [BARE_LINE.fullmatch(line) for line in lines]
    if len(bare) > 1 and all(bare):
        yield tuple((int(match[1]),) for match in bare if match)


def _json(own: str, echoes: Sequence[str]) -> str | None:
    """The JSON in which a reply states its ranking: the whole of it, or a fenced block that begins or ends it."""
    if found := statements.WHOLE.match(own):
        return found[1] if statements.whole(own, JSON) is not None else None
    if statements.block(own, echoes, JSON) and (fenced := statements.FENCED.search(own)):
        return fenced[1]
    return None


def _of_json(block: str) -> Iterator[Tiers | None]:
    """The value of every key that names a ranking, wherever it stands."""
    found: list[Tiers | None] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for key, value in pairs:
            if any(keys.fullmatch(statements.WORD_BREAK.sub(" ", key)) for keys in JSON.keys):
                found.append(_of_value(value))
        return dict(pairs)

    json.loads(statements.TRAILING_COMMA.sub("", block), strict=False, object_pairs_hook=look)
    yield from found


def _of_value(value: Any) -> Tiers | None:
    if isinstance(value, str):
        match = re.fullmatch(rf"(?i)\W*?{CHAIN}\W*", value)
        return _tiers(match["chain"]) if match else None
    if not isinstance(value, list):
        return None
    tiers = [each if isinstance(each, list) else [each] for each in value]
    numbers = [[_number(each) for each in tier] for tier in tiers]
    if not all(number is not None for tier in numbers for number in tier):
        return None
    return tuple(tuple(number for number in tier if number is not None) for tier in numbers)


def _number(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = BARE_LINE.fullmatch(value) if isinstance(value, str) else None
    return int(match[1]) if match else None
