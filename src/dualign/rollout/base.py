"""What every sampler is, and how its randomness is drawn."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dualign.common.types import Prompt, Rollout


@dataclass(frozen=True)
class Sampling:
    k: int
    max_new_tokens: int
    temperature: float  # 0: greedy
    top_p: float = 1.0


@dataclass(frozen=True)
class Request:
    """One prompt to be answered K times. `group` is its place in the online batch."""

    group: int
    prompt: Prompt
    prompt_ids: tuple[int, ...]


Weights = Callable[[], Iterator[tuple[str, Tensor]]]
"""Gives every weight of π_θ under the name that Hugging Face gives it, one at a time."""


class Sampler(Protocol):
    """Samples from π_t. `done` is called once per completion as it finishes, while others are still being decoded;
    for the rows in `held`, which are there already, it need not be."""

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: tuple[int, int],
        done: Callable[[Rollout], None],
        held: Container[int] = (),
    ) -> None: ...

    def sync(self, weights: Weights) -> None:
        """Take over π_θ's weights: from here on they are π_t. Called before completions are sampled, where weights are
        new. A sampler with weights of its own reads them, to the last one: with several processes all read together."""
        ...


def finished(row: tuple[Request, int], tokenizer: Any, ids: Sequence[int], logp: Sequence[float]) -> Rollout:
    """The rollout of one row of a request: token ids up to its end, and their log-probs."""
    request, index = row
    ended = ids[-1] in tokenizer.eos_ids
    return Rollout(
        index=index,
        group=request.group,
        prompt=request.prompt,
        prompt_ids=request.prompt_ids,
        completion_ids=tuple(ids),
        text=tokenizer.text(ids[:-1] if ended else ids, request.prompt.conversational),
        finish="eos" if ended else "length",
        sampler_logp=tuple(logp),
    )


def uniforms(seed: tuple[int, int], row: int, count: int) -> NDArray[np.float64]:
    """`count` uniforms of one completion, from a counter-based generator: they depend on the run's seed, the online
    batch and the row alone, so that the number of processes, the order of decoding and a resume change nothing."""
    return _generator(seed, row).random(count)


def seed_of(seed: tuple[int, int], row: int) -> int:
    """The same as one number, for a sampler that draws by a generator of its own; below 2^63."""
    return int(_generator(seed, row).integers(2**63))


def _generator(seed: tuple[int, int], row: int) -> np.random.Generator:
    run, batch = seed
    key = np.array(
        [(run * 0x9E3779B97F4A7C15 + 0xD1) & (2**64 - 1), ((batch & 0xFFFFFFFF) << 32) | row], dtype=np.uint64
    )
    return np.random.Generator(np.random.Philox(key=key))
