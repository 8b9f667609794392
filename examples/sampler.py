"""A sampler of one's own: it replays completions from a file that `dualign sample --out` wrote.

dualign train mine.yaml rollout.engine=examples/sampler.py:Replay rollout.options.file=completions.jsonl
"""

import json
from pathlib import Path

from pydantic import Field

from dualign import SamplerSettings, UserError
from dualign.rollout.base import finished


class Replay(SamplerSettings):
    file: str = Field(description="completions of every prompt, as `dualign sample --out` writes them")

    def check(self):
        if not Path(self.file).is_file():
            raise UserError(f"rollout.options.file: no such file {self.file}")

    def build(self, policy, tokenizer, recorded):
        self.check()
        said = {}
        for row in map(json.loads, Path(self.file).read_text(encoding="utf-8").splitlines()):
            said.setdefault(row["id"], []).append(row["completion_ids"])
        return Replayed(said, tokenizer)


class Replayed:
    def __init__(self, said, tokenizer):
        self.said, self.tokenizer = said, tokenizer

    def sample(self, requests, sampling, seed, done, held=()):
        for request in requests:
            for k in range(sampling.k):  # a row's number: its prompt's place in the batch, times K, plus k
                ids = self.said[request.prompt.id][k][: sampling.max_new_tokens]
                done(finished((request, request.group * sampling.k + k), self.tokenizer, ids, logp=()))

    def sync(self, weights): ...  # a file has no weights
