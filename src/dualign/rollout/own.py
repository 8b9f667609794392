"""A sampler of the user's own: what it raises is said with its place, and what it gives is looked at."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from dualign.common.errors import UserError, out_of_memory
from dualign.common.named import run_own
from dualign.common.types import Rollout
from dualign.rollout.base import Request, Sampler, Sampling, Weights


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

        self._run(lambda: self.sampler.sample(requests, sampling, seed, checked, held))

    def sync(self, weights: Weights) -> None:
        self._run(lambda: self.sampler.sync(weights))

    def close(self) -> None:
        end = getattr(self.sampler, "close", None)
        if callable(end):
            self._run(end)

    def _run(self, work: Callable[[], None]) -> None:
        run_own(f"rollout.engine {self.engine}", work, passes=out_of_memory)  # which the loop has an answer to
