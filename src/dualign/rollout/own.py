"""A sampler of the user's own: what it raises is said with its place, and what it gives is looked at."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Container, Sequence
from typing import TypeVar

from dualign.common.errors import StopRun, UserError
from dualign.common.interrupt import StopAsked
from dualign.common.types import Rollout
from dualign.rollout.base import Request, Sampler, Sampling, Weights

X = TypeVar("X")


class OwnSampler:
    """Does what `sampler` does. `engine`: its place, for people; `recorded`: whether its log-probs are log π_t."""

    def __init__(self, engine: str, sampler: Sampler, recorded: bool) -> None:
        self.engine, self.sampler, self.recorded = engine, sampler, recorded

    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: tuple[int, int],
        done: Callable[[Rollout], None],
        held: Container[int] = (),
    ) -> None:
        def checked(rollout: Rollout) -> None:
            count, tokens = len(rollout.sampler_logp), len(rollout.completion_ids)
            if count != tokens and (count or self.recorded):
                raise UserError(
                    f"rollout.engine {self.engine}: completion {rollout.index} has {tokens} tokens and {count} log-probs"
                    + ("; rollout.log_probs=recomputed does without" if self.recorded else "")
                )
            done(rollout)

        said_plainly(self.engine, lambda: self.sampler.sample(requests, sampling, seed, checked, held))

    def sync(self, weights: Weights) -> None:
        said_plainly(self.engine, lambda: self.sampler.sync(weights))


def said_plainly(engine: str, work: Callable[[], X]) -> X:
    """What `work` returns. What the user's code raises becomes a UserError that says where."""
    try:
        return work()
    except (UserError, StopRun, StopAsked, MemoryError):
        raise
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise UserError(
            f"rollout.engine {engine} raised {type(error).__name__}: {error}, {frame.filename} line {frame.lineno}"
        ) from error
