"""Small reward functions that come with the package, in the calling convention of everyone's own."""

from __future__ import annotations

from typing import Any

import numpy as np

ON_TOPIC = 0.8  # cosine from which an answer counts as on topic: repeating the question gains nothing more
SPREAD = 0.2  # standard deviation of the cosine over a small model's answers, so that 1.0 is about one of them


def relevance(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """How much an answer is about what was asked: cosine of MiniLM embeddings of the last user turn and the answer, up
    to ON_TOPIC, in units of SPREAD. A stock apology is far below any real answer."""
    from dualign.annotate.features import encoder

    questions = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
    answers = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    cosine_N = (_unit(encoder().encode(questions, keep="end")) * _unit(encoder().encode(answers, keep="start"))).sum(-1)
    return [float(r) for r in (np.minimum(cosine_N, ON_TOPIC) - ON_TOPIC) / SPREAD]


def _unit(x_ND: np.ndarray) -> np.ndarray:
    return x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True).clip(min=1e-9)
