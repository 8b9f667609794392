"""JSON in a judge's reply, in code fences of any length or without: its answers, a line each, for the rules of
`extract` to read. An answer is told by the whole of its key: a "max_score" is no score."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

FENCED = re.compile(r"(?s)```[\w-]*\s*(\{.*?\}|\[\s*\{.*?\])\s*```")  # not a "[[8]]"
WHOLE = re.compile(r"(?s)\A\s*(?:```[\w-]*\s*)?(\{.*\}|\[\s*\{.*\])\s*(?:```)?\s*\Z")
TRAILING_COMMA = re.compile(r",(?=\s*[}\]])")
WORD_BREAK = re.compile(r"[_-]+|(?<=[a-z])(?=[A-Z])")
WRAPPER = re.compile(
    r"(?i)(?:final |overall )?(?:judge?ment|verdict|evaluation|assessment|results?|output|scores|ratings)"
)
SENTENCE = re.compile(r"[.!?;]\s|\n")
OWN = r"(?:judge?ment|verdict|scores?|ratings?|evaluation|results?|assessment|grade|decision|conclusion|choice|preference)"
LEAD_IN = re.compile(  # the judge announces its verdict, and says nothing else
    r"(?i)\W*(?:(?:based on|given|considering|after|overall|therefore|thus|so|finally|in (?:summary|conclusion))\b"
    r"[^:,]*,\s*)?(?:here it is|(?:(?:here|below)(?:'s| is| are)\s+)?(?:(?:my|the)\s+)?(?:(?:final|overall)\s+)*"
    rf"(?:{OWN}|(?<=my )answer|(?<=final )answer)(?:\s+(?:in|as)(?:\s+\w+)?\s+json(?:\s+format)?)?"
    r"(?:\s+(?:is|are))?(?:\s+as follows)?)\W*"
)
REASONS = re.compile(
    r"(?i)\W*(?:the (?:response|answer|summary|reply|completion|assistant)|responses?\b|reason|explanation|rationale|"
    r"justification|because|i\b|overall)"
)
REPORTS = re.compile(  # in the sentence beside a block
    r"(?i)\b(?:prints?|printed|outputs?|returns?|returned|contains?|contained|includes?|included|has|had|quotes?|quoted|"
    r"says?|said|claims?|claimed|writes?|wrote|ends?|begins?|starts?|reads?|would|should|example|answered|replied|"
    r"responded|gave|given|produced|wants?|wanted|asks?|asked|requested|shown|this|that|these|those|with|simply|just|"
    rf"only|exactly|nothing|whole|entire|rated?|{OWN})\b"
)
POINTS = re.compile(  # anywhere beside a block
    r"(?i)\b(?:json|blocks?|fenced|snippets?|formats?|above|below|following|follows|verbatim|literally)\b"
)


REASONING = r"(?:think|thinking|thoughts?|reasoning|analysis|scratchpad|reflection)"
THOUGHT = re.compile(rf"(?is)\A\s*[<\[]({REASONING})[>\]].*?[<\[]/\1[>\]]")  # before an answer
OBJECT = re.compile(r'\s*(?:```\w*\s*)?(?=\{\s*")')
CLOSING = re.compile(r"(?:<\|\w+\|>|</s>|\s)+\Z")  # a token that the server left


@dataclass(frozen=True)
class Asked:
    """What is looked for: its keys, the telling ones before those that count only where there are none; how a value
    that can be read is written; the label under which the rules of `extract` read it."""

    keys: tuple[re.Pattern[str], ...]
    value: re.Pattern[str]
    label: str


def of_reply(reply: str, cut: bool, echoes: Sequence[str]) -> tuple[str | None, str | None]:
    """The JSON that a reply is, and nothing else; or why a reply states nothing: it is half an object, or only repeats
    what it was to judge. Both None for all others. To be asked before anything is taken out of a reply: what a string in
    it quotes ("</think>", a mark) is part of that string."""
    text = CLOSING.sub("", THOUGHT.sub("", reply)).strip()
    bare = _bare(text)
    if len(bare) >= 12 and any(bare in _bare(echo) for echo in echoes):
        return None, "only repeats what it was to judge"
    found = WHOLE.match(text)
    if found and _loads(found[1]):
        return found[1], None
    begun = OBJECT.match(text)
    if begun is None:
        return None, None
    try:
        _, end = json.JSONDecoder(strict=False).raw_decode(text[begun.end() :])
    except (ValueError, RecursionError):
        return None, "cut off before an answer" if cut else "JSON that cannot be read"
    again = text[begun.end() + end :].lstrip("` \n").startswith("{")
    return None, "two JSON objects" if again else None


def _loads(text: str) -> bool:
    try:
        json.loads(TRAILING_COMMA.sub("", text), strict=False)
    except (ValueError, RecursionError):
        return False
    return True


def whole(text: str, asked: Asked) -> str | None:
    """The answers of a reply that is JSON and nothing else ("" where there are none); None for any other reply."""
    found = WHOLE.match(text)
    return _answers(found[1], asked) if found else None


def block(text: str, echoes: Sequence[str], asked: Asked) -> str | None:
    """The answers of the one fenced JSON block that begins or ends a reply ("Here is my judgement: ...")."""
    found = fenced(text, echoes)
    return None if found is None else _answers(found, asked)


def fenced(text: str, echoes: Sequence[str]) -> str | None:
    """The one fenced JSON block that begins or ends a reply. None where the words beside it may be about the block, or
    where the judged texts (`echoes`) hold it."""
    found = FENCED.search(text)
    if found is None or text.count("```") != 2:
        return None
    before, after = text[: found.start()].strip(), text[found.end() :].strip()
    if (before and after) or (before and not _leads_to(before)) or (after and not _explains(after)):
        return None
    if any(_bare(found[1]) in _bare(echo) for echo in echoes):
        return None
    return found[1]


def _leads_to(before: str) -> bool:
    """Whether a verdict of the judge's own follows: announced, or after reasons that end in a full stop."""
    *earlier, last = before.split("\n")
    sentence = SENTENCE.split(last)[-1]
    if LEAD_IN.fullmatch(sentence):
        reported = REPORTS.search(earlier[-1]) if earlier and earlier[-1].rstrip("* ").endswith(":") else None
        return sentence != last or reported is None
    return last.endswith((".", "!")) and not POINTS.search(before) and not REPORTS.search(sentence)


def _explains(after: str) -> bool:
    """Whether these are reasons for the verdict before them, and not about the block."""
    first = SENTENCE.split(after)[0]
    return bool(REASONS.match(after)) and not POINTS.search(after) and not REPORTS.search(first)


def _answers(block: str, asked: Asked) -> str | None:
    """A line for each answer. "" where there is none, or where one cannot be read: the others are then no answer."""
    try:
        tree = json.loads(TRAILING_COMMA.sub("", block), strict=False, object_pairs_hook=_Pairs)
        entries = list(_entries(tree, "", asked))
    except (ValueError, RecursionError):
        return None
    for keys in asked.keys:
        if said := [value for key, value in entries if keys.fullmatch(key)]:
            read = all(not isinstance(value, bool) and asked.value.fullmatch(str(value)) for value in said)
            return "\n".join(f"{asked.label}: {str(value).strip('*_` ')}" for value in said) if read else ""
    return ""


class _Pairs(list[tuple[str, Any]]):
    """An object with every key that it names, also one that it names twice."""


def _entries(value: Any, key: str, asked: Asked) -> Iterator[tuple[str, Any]]:
    """Keys and plain values. An object within another is one aspect of many, unless its key says that it is all."""
    if isinstance(value, _Pairs):
        for name, inner in value:
            # {"score": {"value": 7}}
            said = key if key and name == "value" else WORD_BREAK.sub(" ", name)
            known = WRAPPER.fullmatch(said) or any(keys.fullmatch(said) for keys in asked.keys)
            if known or len(value) == 1 or not isinstance(inner, list):
                yield from _entries(inner, said, asked)
    elif isinstance(value, list):
        for inner in value:
            yield from _entries(inner, key, asked)
    else:
        yield key, value


def _bare(text: str) -> str:
    return re.sub(r"\s+", "", text)
