"""Decoding by the model's own cache and masks: transformers' `generate`, which every family brings what it needs to.

Prompts of one length are decoded together, so nothing is padded: recurrent layers see no token that is not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from dualign.common.types import Rollout
from dualign.models.policy import Policy
from dualign.rollout.base import Request, Sampling, finished, uniforms
from dualign.rollout.hf.draw import choose


@torch.no_grad()
def generate(
    policy: Policy,
    tokenizer: Any,
    rows: int,
    requests: Sequence[Request],
    sampling: Sampling,
    seed: tuple[int, int],
    done: Callable[[Rollout], None],
    shortest: int = 0,
) -> None:
    """Calls `done` once per completion, as it finishes. At most `rows` rows are decoded side by side; those of prompts of
    fewer than `shortest` tokens without a cache, every token from the whole text."""
    at_once = max(1, rows // sampling.k)
    by_length = sorted(requests, key=lambda r: -len(r.prompt_ids))
    for length, group in groupby(by_length, key=lambda r: len(r.prompt_ids)):
        alike = list(group)
        for at in range(0, len(alike), at_once):
            _generate(policy, tokenizer, alike[at : at + at_once], sampling, seed, done, length >= shortest)


def _generate(
    policy: Policy,
    tokenizer: Any,
    requests: Sequence[Request],
    s: Sampling,
    seed: tuple[int, int],
    done: Callable[[Rollout], None],
    use_cache: bool,
) -> None:
    rows = [(r, r.group * s.k + k) for r in requests for k in range(s.k)]
    ids = torch.tensor([r.prompt_ids for r, _ in rows], device=policy.device)
    chooser = _Chooser(rows, tokenizer, s, seed, done, policy.device)
    settings = GenerationConfig(
        max_new_tokens=s.max_new_tokens,
        do_sample=False,  # the chosen token is the only one left
        eos_token_id=sorted(tokenizer.eos_ids) or None,
        pad_token_id=tokenizer.pad_id,
        use_cache=use_cache,
    )
    model: Any = policy.model.get_base_model() if hasattr(policy.model, "get_base_model") else policy.model
    kept, model.generation_config = model.generation_config, settings  # none of the model's own penalties and limits
    try:
        with policy.autocast():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=settings,
                logits_processor=LogitsProcessorList([chooser]),
            )
    finally:
        model.generation_config = kept


class _Chooser(LogitsProcessor):
    """Chooses each row's next token by the row's own uniforms, as our decode loop does, and leaves no other."""

    def __init__(
        self,
        rows: Sequence[tuple[Request, int]],
        tokenizer: Any,
        sampling: Sampling,
        seed: tuple[int, int],
        done: Callable[[Rollout], None],
        device: torch.device,
    ) -> None:
        self.rows, self.tokenizer, self.sampling, self.done = rows, tokenizer, sampling, done
        drawn = np.stack([uniforms(seed, index, sampling.max_new_tokens) for _, index in rows])
        self.draw_NT = torch.from_numpy(drawn).to(device)
        self.ids: list[list[int]] = [[] for _ in rows]
        self.logp: list[list[float]] = [[] for _ in rows]
        self.open = set(range(len(rows)))
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores: (N, V) logits. Returns them with all but the chosen tokens at -inf."""
        token_N, logp_N = choose(scores, self.sampling, self.draw_NT[:, self.step])
        self.step += 1
        for i, (token, logp) in enumerate(zip(token_N.tolist(), logp_N.tolist(), strict=True)):
            if i in self.open:
                self._take(i, token, logp)
        return torch.full_like(scores, -torch.inf).scatter(1, token_N[:, None], 0.0)

    def _take(self, row: int, token: int, logp: float) -> None:
        self.ids[row].append(token)
        self.logp[row].append(logp)
        if token in self.tokenizer.eos_ids or self.step == self.sampling.max_new_tokens:
            self.open.remove(row)
            self.done(finished(self.rows[row], self.tokenizer, self.ids[row], self.logp[row]))
