"""Small reward functions that come with the package, in the calling convention of everyone's own."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

ON_TOPIC = 0.8  # cosine from which an answer counts as on topic: being closer gains nothing more
SPREAD = 0.2  # standard deviation of the cosine over a small model's answers, so that 1.0 is about one of them
COPIED = 4  # so many words in a row that also stand in the question say nothing of their own
WORD = re.compile(r"[\w'’]+")


def relevance(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """How much an answer is about what was asked: cosine of MiniLM embeddings of the last user turn and of what the
    answer says in its own words, up to ON_TOPIC, in units of SPREAD. A stock apology is far below any real answer, and
    so is the question said back."""
    from dualign.annotate.features import encoder

    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    answers = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    answers = [own_words(q, a) for q, a in zip(questions, answers, strict=True)]
    cosine_N = (_unit(encoder().encode(questions, keep="end")) * _unit(encoder().encode(answers, keep="start"))).sum(-1)
    return [float(r) for r in (np.minimum(cosine_N, ON_TOPIC) - ON_TOPIC) / SPREAD]


def own_words(question: str, answer: str) -> str:
    """The answer without the runs of COPIED or more words that also stand in the question."""
    asked = WORD.findall(question.casefold())
    runs = {tuple(asked[i : i + COPIED]) for i in range(len(asked) - COPIED + 1)}
    words = WORD.findall(answer)
    said = [word.casefold() for word in words]
    copied = {j for i in range(len(said)) if tuple(said[i : i + COPIED]) in runs for j in range(i, i + COPIED)}
    if not copied:
        return answer
    return " ".join(word for j, word in enumerate(words) if j not in copied)


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True).clip(min=1e-9)
