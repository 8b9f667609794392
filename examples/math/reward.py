"""Verifiable rewards in GSM8K's form: 1 where the last number of the answer is the one after `####`."""

import re

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def right(completions, answer, **columns):
    """`answer`: GSM8K's column, which ends with `#### 18`."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [float(value(text) == value(known.split("####")[-1])) for text, known in zip(texts, answer, strict=True)]


def value(text):
    """The last number of a text; None where there is none."""
    found = NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
