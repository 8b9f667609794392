"""Labels in words, for those who look for what a judge does wrong."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

from dualign.common.errors import clean
from dualign.common.types import Label

log = logging.getLogger(__name__)
QUOTED, CHARACTERS = 2, 160  # replies that are quoted, and how much of each


def shortened(text: str, most: int) -> str:
    """On one line, with its end left out where it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 1].rstrip()}…"


def absent_words(labels: Sequence[Label], most: int = 5) -> str:
    """Why labels are absent: each reason with how often it was given, the most frequent first; then two of the replies
    that gave none."""
    absent = [label for label in labels if label.value is None]
    counts = Counter(label.reason or "no reason given" for label in absent)
    told = [f"{count} × {reason}" for reason, count in counts.most_common(most)]
    if len(counts) > most:
        told.append(f"{len(counts) - most} other reasons")
    quotes = list(dict.fromkeys(shortened(label.note, CHARACTERS) for label in absent if label.note))[:QUOTED]
    return "; ".join(told) + (f". Replies: {' / '.join(f'“{quote}”' for quote in quotes)}" if quotes else "")


def say_absent(what: str, labels: Sequence[Label]) -> None:
    """To people, why labels are absent, where any is."""
    if absent := [label for label in labels if label.value is None]:
        log.warning(
            "note: %s: %d of %d labels are absent: %s", what, len(absent), len(labels), clean(absent_words(absent))
        )
