"""log π_t of a batch, where the forward pass of its first update gives some of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import Tensor

from dualign.algos import Algorithm, Batch
from dualign.config import Config
from dualign.run.batch import WeightedBatch, has_signal, importance, part_of, recorded_logp, update_rows, weigh
from dualign.training.engine import Engine, Sums

Phases = Callable[[str], AbstractContextManager[None]]


class FirstPass:
    """π_t is π_θ before the first update. So where a prompt's weights rest on its own rows, and nothing in the forward
    pass is random, the rows of the first update need no scoring of their own: log π_t, weights, loss and gradient are
    made a micro-batch at a time, and the gradient waits here for that update."""

    def __init__(self, config: Config, engine: Engine) -> None:
        self.config, self.engine = config, engine
        self._sums: tuple[int, Sums] | None = None  # the online batch whose first gradient is there, and its sums

    def log_pi_t(self, b: WeightedBatch, ref_NT: Tensor | None, value_NT: Tensor | None, clock: Phases) -> Tensor:
        """(N, T) log π_t of the batch; as the sampler recorded it, where rollout.log_probs says so."""
        config, engine = self.config, self.engine
        algo: Algorithm = config.algo
        self._sums = None
        if config.rollout.log_probs == "recorded" and algo.source == "online" and b.batch.logp_behaviour_NT is None:
            return recorded_logp(b)
        first: list[int] = []
        begins = has_signal(b, algo) or config.train.no_signal == "train"  # else it makes no update
        if begins and algo.by_prompt and not engine.has_dropout:
            first = next(update_rows(b, algo, config.train.update_size, config.run.seed), first)
        with clock("score"):
            old_NT = engine.score(engine.policy, b.tokens, but=set(first))
        if not first:
            return old_NT
        tokens = b.tokens.select(first)

        def weighted(known_NT: Tensor) -> Batch:
            old_NT[first, : tokens.width] = known_NT
            mu_NT = b.batch.logp_behaviour_NT
            ratio_N = importance(b, old_NT if mu_NT is None else mu_NT, config.rollout.importance_cap)
            return part_of(weigh(b, algo, old_NT, ref_NT, value_NT, ratio_N), first)[1]

        engine.begin_update(b.step, 0)
        with clock("update"):
            old_NT[first, : tokens.width], sums = engine.begin(algo, tokens, weighted)
        self._sums = b.step, sums
        return old_NT

    def begun(self, step: int, update: int) -> Sums | None:
        """What the gradient of this update has summed up, once, if it is there already."""
        found, self._sums = self._sums, None
        return found[1] if found and (step, update) == (found[0], 0) else None
