"""A sampler of one's own: completions come from a file, a line per prompt: {"id": ..., "completions": [...]}.

dualign train mine.yaml rollout.engine=examples/sampler.py:Replay rollout.options.file=completions.jsonl
"""

import json
from pathlib import Path

from pydantic import Field

from dualign import SamplerSettings, UserError
from dualign.rollout.base import finished


class Replay(SamplerSettings):
    file: str = Field(description="the completions, by prompt id")

    def build(self, policy, tokenizer, recorded):
        if recorded:
            raise UserError("rollout.log_probs: a file has no log-probs; set rollout.log_probs=recomputed")
        lines = Path(self.file).read_text(encoding="utf-8").splitlines()
        return Replayed({row["id"]: row["completions"] for row in map(json.loads, lines)}, tokenizer)


class Replayed:
    def __init__(self, texts, tokenizer):
        self.texts, self.tokenizer = texts, tokenizer

    def sample(self, requests, sampling, seed, done, held=()):
        for request in requests:
            for k in range(sampling.k):
                text = self.texts[request.prompt.id][k]
                ids = self.tokenizer.hf.encode(text, add_special_tokens=False)[: sampling.max_new_tokens - 1]
                ids.append(min(self.tokenizer.eos_ids))
                done(finished((request, request.group * sampling.k + k), self.tokenizer, ids, logp=()))

    def sync(self, weights):
        """A file has no weights."""
