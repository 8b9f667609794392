"""Held-out pairs or demonstrations: what a system that learns from a fixed set is worth on rows it was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dualign.algos import Algorithm
from dualign.annotate.agreement import wilson
from dualign.common.intervals import half_width, none_for_nan
from dualign.common.types import Example, Label
from dualign.config import Config
from dualign.run.batch import Row, WeightedBatch, labelled, weigh
from dualign.training.clock import Clock
from dualign.training.engine import Engine
from dualign.training.heldout import at_pi_0, gain, part_of_label
from dualign.training.source import DatasetSource

MEASURED = ("loss", "margin", "accuracy")


@dataclass(frozen=True)
class HeldOutSet:
    """The system's own loss, and of pairs its margin (β times how much more the chosen answer scores) and accuracy (how
    often that is above 0; 0 counts half). Half widths of 95 % t-intervals, None where there is none; of accuracy,
    Wilson's interval."""

    batches: int
    data: str  # pairs or demonstrations
    rows: int  # of them
    loss: float
    loss_ci: float | None
    margin: float | None  # None, with accuracy, of demonstrations
    margin_ci: float | None
    accuracy: float | None
    accuracy_low: float | None
    accuracy_high: float | None
    length: float  # tokens
    seconds: float

    def record(self) -> dict[str, Any]:
        return none_for_nan(asdict(self))


def evaluate_set(
    config: Config, engine: Engine, examples: Sequence[Example], done: int
) -> tuple[HeldOutSet, list[Row]]:
    """Of the policy as it stands. Each group's first row has what was measured of it among its label's parts, and every
    row its log-prob."""
    algo: Algorithm = config.algo
    source, clock = DatasetSource(config, engine.processes, engine.tokenizer, examples), Clock()
    b = labelled(done, [row for g, example in enumerate(examples) for row in source.rows_of(g, example)])
    with clock("score"):
        logp_NT = engine.score(engine.policy, b.tokens)
        ref_NT = None
        if algo.needs_ref:
            ref_NT = logp_NT if at_pi_0(config, done) else engine.score_reference(b.tokens)
        loss_P, denominator_P, margin_P = _measured(weigh(b, algo, None, ref_NT, None), algo, logp_NT)
    loss = float(loss_P.sum() / denominator_P.sum())
    # the loss is a ratio of sums: its interval is that of the groups' residuals (of pairs, whose denominators are 1, the
    # mean's own)
    loss_ci = half_width(loss_P - loss * denominator_P) / denominator_P.mean()
    right_P = None if margin_P is None else (np.sign(margin_P) + 1) / 2
    low, high = (None, None) if right_P is None else wilson(float(right_P.sum()), len(right_P))
    result = HeldOutSet(
        batches=done,
        data=algo.source,
        rows=len(loss_P),
        loss=loss,
        loss_ci=float(loss_ci),
        margin=None if margin_P is None else float(margin_P.mean()),
        margin_ci=None if margin_P is None else half_width(margin_P),
        accuracy=None if right_P is None else float(right_P.mean()),
        accuracy_low=low,
        accuracy_high=high,
        length=float(np.mean([len(ids) for ids in b.tokens.completion_ids])),
        seconds=sum(clock.seconds.values()),
    )
    parts = {"loss": loss_P / denominator_P} | (
        {} if margin_P is None or right_P is None else {"margin": margin_P, "accuracy": right_P}
    )
    seq_N = b.batch.seq(logp_NT)
    return result, [_with_parts(row, float(seq_N[i]), parts) for i, row in enumerate(b.rows)]


def _measured(b: WeightedBatch, algo: Algorithm, logp_NT: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """By group: the sum of the loss's terms, what it is divided by, and the margin where the system has one. (P,)"""
    found: list[tuple[float, float, float | None]] = []
    group_N = b.batch.group_N
    for group in range(int(group_N.max()) + 1):
        chosen = (group_N == group).nonzero()[:, 0]
        rows = b.batch.select(chosen)
        with torch.no_grad():
            loss, columns = algo.loss(logp_NT[chosen], rows)
        margin = float(columns["margin"][0]) if "margin" in columns else None
        found.append((float(loss), float(algo.denominator(rows)), margin))
    loss_P, denominator_P = (np.array([f[i] for f in found], dtype=float) for i in (0, 1))
    margins = [m for *_, m in found if m is not None]
    return loss_P, denominator_P, np.array(margins) if margins else None


def _with_parts(row: Row, log_prob: float, parts: dict[str, np.ndarray]) -> Row:
    """`parts`, by group, go to the group's first row: its chosen answer, or the demonstration."""
    own: dict[str, float | None] = {"log_prob": log_prob}
    if row.label.value == 1:
        own |= {name: float(values[row.rollout.group]) for name, values in parts.items()}
    return Row(row.rollout, Label(row.label.value, parts=own))


def changes(before: Sequence[Row], after: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """The paired difference of each number over the rows that both evaluations have, with half its 95 % interval. (Of
    demonstrations, the mean of each one's own loss: a long one counts no more than a short one.)"""
    found = {}
    for name in MEASURED:
        change = gain(before, after, part_of_label(name))
        if change["n"]:
            found[name] = {"change": change["gain"], "change_ci": change["gain_ci"], "n": change["n"]}
    return found
