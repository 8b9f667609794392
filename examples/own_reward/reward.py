"""A reward function: one sentence of at most twenty words. TRL's calling convention."""

import re


def one_sentence(completions, **columns):
    """`columns` holds every other column of the data by its name, one entry per completion."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [score(text.strip()) for text in texts]


def score(text):
    """0 at best. Half a point for each sentence too many or missing, a tenth for each word beyond twenty."""
    sentences = len(re.findall(r"[.!?](?=\s|$)", text))
    excess = max(0, len(text.split()) - 20)
    return -0.5 * abs(sentences - 1) - 0.1 * excess - (0 if text.endswith((".", "!", "?")) else 0.5)
