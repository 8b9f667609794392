"""A summary is worth what it shares with a person's summary (ROUGE-1's F, by words), less for length."""

import re
from collections import Counter


def overlap(completions, references, **columns):
    """`references`: a column of the data, the people's summaries of each paper."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [max(f1(text, known) for known in each) for text, each in zip(texts, references, strict=True)]


def f1(text, known):
    said, wanted = (Counter(re.findall(r"\w+", t.lower())) for t in (text, known))
    both = sum((said & wanted).values())
    return 2 * both / max(1, sum(said.values()) + sum(wanted.values()))
