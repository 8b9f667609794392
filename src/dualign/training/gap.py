"""Whether the completions of an online batch were drawn from the policy: the sampler's log-probs beside the policy's."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dualign.common.errors import StopRun
from dualign.config import Config
from dualign.run.batch import WeightedBatch, recorded_logp, tokens_of
from dualign.training.engine import Engine

log = logging.getLogger(__name__)
FEW = 2  # rows that are scored for this where nobody else needs log π_t
LEAST = {"bf16": 0.1, "fp32": 0.01}  # nats a token that are rounding on any model
ROUNDING = 8.0  # times the rounding of a forward pass on this model, measured on loading


def check_sampler(config: Config, engine: Engine, b: WeightedBatch, logp_old_NT: Tensor | None) -> None:
    """Raises StopRun where the sampler's log-probs of a batch's tokens are further from the policy's, on average, than
    rounding explains: what was sampled is then not π_t's, and log π_t, if it is recorded, is wrong. logp_old_NT: (N, T)
    log π_t as the policy scored it; None where it did not, and a few rows are scored here."""
    rows = list(range(len(b.tokens)))
    if not rows or not any(row.rollout.sampler_logp for row in b.rows):
        return  # nothing was sampled: a fixed set's completions have no log-probs of a sampler
    recorded_NT = recorded_logp(b)
    if logp_old_NT is None:
        longest = max(rows, key=lambda i: len(b.tokens.prompt_ids[i]) + len(b.tokens.completion_ids[i]))
        rows = sorted({longest, *((b.step + i) % len(rows) for i in range(FEW - 1))})
        tokens = b.tokens.select(rows)
        logp_old_NT = engine.score(engine.policy, tokens)
        recorded_NT = recorded_NT[rows, : tokens.width]
    mask_NT = b.batch.mask_NT[rows, : logp_old_NT.shape[1]]
    gap = float(((logp_old_NT - recorded_NT).abs() * mask_NT).sum() / mask_NT.sum().clamp(min=1))
    allowed = allowed_gap(config, engine)
    if allowed / 2 < gap <= allowed:
        log.warning(
            "online batch %d: the sampler's log-probs are %.2g nats a token from the policy's; above %.2g the run stops "
            "(rollout.max_sampler_gap)", b.step, gap, allowed,
        )  # fmt: skip
    if not gap <= allowed and torch.isfinite(logp_old_NT).all():  # what is not finite has an error of its own
        raise StopRun(
            f"online batch {b.step}: the sampler's log-probs are {gap:.2g} nats a token from the policy's, where rounding "
            f"explains {allowed:.2g}: its completions are not the policy's. Nothing was trained on them; they and their "
            "labels are kept. Another rollout.max_sampler_gap moves the limit"
        )


def allowed_gap(config: Config, engine: Engine) -> float:
    """Nats a token, on average over a batch."""
    if config.rollout.max_sampler_gap is not None:
        return config.rollout.max_sampler_gap
    decoding = engine.policy.decoding
    return max(LEAST[config.model.precision], ROUNDING * (decoding.rounding if decoding else 0.0))


def gap_of_absent(
    config: Config, engine: Engine, b: WeightedBatch, mu: Mapping[int, Sequence[float]] | None
) -> float | None:
    """The sum of log π/π_0 over the rows without a label: how far the policy is from π_0 needs none. π: that which
    sampled them, `mu` by row where it is not π_t. None where there are no such rows, or the system asks for no such
    scores."""
    rows, algo = [row for row in b.rows if row.label.value is None], config.algo
    if not rows or algo.source != "online" or not (config.needs_old and algo.needs_ref):
        return None
    tokens = tokens_of(rows)
    ref = float(engine.score_reference(tokens).double().sum())
    if mu is not None:
        return math.fsum(x for row in rows for x in mu[row.rollout.index]) - ref
    if config.rollout.log_probs == "recorded":
        return sum(math.fsum(row.rollout.sampler_logp) for row in rows) - ref
    return float(engine.score(engine.policy, tokens).double().sum()) - ref
