"""Fitting reward heads on preferences: a ridge Bradley-Terry model per file, a gate between them, and how often the
result agrees with people."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dualign.annotate.features import DIM, ENCODER, Array, encoder, features
from dualign.annotate.head import Head
from dualign.common.errors import UserError
from dualign.common.types import Example

GRID = (0.003, 0.01, 0.03, 0.1, 0.3)  # inverse ridge strengths tried
GATE_C = 3.0
FOLDS = 5
BOOTSTRAPS = 2000


@dataclass(frozen=True)
class Pairs:
    """The pairs of one preference file, encoded. `group_N` numbers the opening messages: pairs that share one are
    never on two sides of a split, and are resampled together."""

    prompt_ND: Array
    chosen_ND: Array
    rejected_ND: Array
    group_N: np.ndarray
    longer_N: np.ndarray  # 1: the chosen answer has more characters, 0: fewer, 0.5: as many

    def __len__(self) -> int:
        return len(self.prompt_ND)

    @property
    def difference(self) -> Array:
        """f(q, chosen) − f(q, rejected), (N, 2·DIM): what the Bradley-Terry model sees of a pair."""
        return features(self.prompt_ND, self.chosen_ND) - features(self.prompt_ND, self.rejected_ND)


@dataclass(frozen=True)
class Agreement:
    """Share of pairs in which the chosen answer scores higher (ties count half), with its 95 % interval."""

    share: float
    low: float
    high: float
    pairs: int
    longer: float  # the same share for the rule "the longer answer is better"

    def __str__(self) -> str:
        return (
            f"{self.share:.1%} of {self.pairs} pairs (95 % interval {self.low:.1%} to {self.high:.1%}; "
            f"the longer answer: {self.longer:.1%})"
        )


def encode_pairs(
    examples: Sequence[Example], progress: Callable[[int], None] = lambda n: None, by: str = ENCODER
) -> Pairs:
    """Encode prompts (last user turn) and answers. Calls `progress` with numbers that sum to 3 per example."""
    encode = encoder(by).encode
    chosen, rejected = ([e.completions[side] for e in examples] for side in (0, 1))
    opening = [e.prompt.messages[0]["content"].strip().lower() for e in examples]
    gap = np.array([len(c) - len(r) for c, r in zip(chosen, rejected, strict=True)])
    return Pairs(
        encode([e.prompt.text for e in examples], "end", progress),
        encode(chosen, "start", progress),
        encode(rejected, "start", progress),
        np.unique(opening, return_inverse=True)[1],
        (np.sign(gap) + 1) / 2,
    )


def fit_head(
    sets: Sequence[Pairs], c: float | None = None, gate_prompts: Sequence[Array] = (), by: str = ENCODER
) -> Head:
    """One head over all sets, encoded `by` one encoder. `c` is the inverse ridge strength; None chooses it for each set
    by cross-validation. `gate_prompts`: encoded prompts without answers, one array per set, that the gate learns from as
    well."""
    fitted = [_fit_one(pairs, c) for pairs in sets]
    origins = [(source, pairs.prompt_ND) for source, pairs in enumerate(sets)] + list(enumerate(gate_prompts))
    gate_weight, gate_bias = _fit_gate(origins, len(sets))
    return Head(
        weight=np.stack([weight for weight, *_ in fitted]),
        mean=np.array([mean for _, mean, *_ in fitted], np.float32),
        std=np.array([std for _, _, std, _ in fitted], np.float32),
        gate_weight=gate_weight,
        gate_bias=gate_bias,
        about={"encoder": by, "features": "a, sqrt(D) q*a", "fits": [about for *_, about in fitted]},
    )


def agreement(score_N: np.ndarray, pairs: Pairs, seed: int = 0) -> Agreement:
    """Agreement of score differences (chosen − rejected) with people; the interval is a percentile bootstrap over
    opening messages, since pairs of one prompt are not independent."""
    right_N = (np.sign(score_N) + 1) / 2
    _, group_N = np.unique(pairs.group_N, return_inverse=True)
    right_G, size_G = np.bincount(group_N, right_N), np.bincount(group_N)
    pick_BG = np.random.default_rng(seed).integers(len(size_G), size=(BOOTSTRAPS, len(size_G)))
    low, high = np.quantile(right_G[pick_BG].sum(1) / size_G[pick_BG].sum(1), [0.025, 0.975])
    return Agreement(float(right_N.mean()), float(low), float(high), len(pairs), float(pairs.longer_N.mean()))


def head_agreement(head: Head, pairs: Pairs) -> Agreement:
    chosen_N, rejected_N = (head.score(pairs.prompt_ND, a) for a in (pairs.chosen_ND, pairs.rejected_ND))
    return agreement(chosen_N - rejected_N, pairs)


def _fit_one(pairs: Pairs, c: float | None) -> tuple[Array, float, float, dict[str, Any]]:
    """(w, mean, std of the scores of the set's answers, what is worth knowing about the fit)."""
    if len(np.unique(pairs.group_N)) < 2 * FOLDS:
        raise UserError(
            f"a reward head needs pairs on at least {2 * FOLDS} different prompts; there are {len(pairs)} pairs"
        )
    difference = pairs.difference
    tried = {value: _cross_validate(difference, pairs.group_N, value) for value in (GRID if c is None else (c,))}
    c = _one_standard_error(tried)
    weight = _bradley_terry(difference, c)
    answers = [features(pairs.prompt_ND, a) @ weight for a in (pairs.chosen_ND, pairs.rejected_ND)]
    scores = np.concatenate(answers)
    if not scores.std() > 0:
        raise UserError("a reward head cannot be fitted: chosen and rejected answers are the same")
    about = {"c": c, "pairs": len(pairs), "cross_validated": asdict(agreement(tried[c], pairs))}
    return weight, float(scores.mean()), float(scores.std()), about


def _bradley_terry(difference: Array, c: float) -> Array:
    """argmin_w ||w||²/2 + C Σ log(1 + exp(−w·(f_chosen − f_rejected)))   (Bradley & Terry 1952, ridge).

    Every other pair is turned round, which changes nothing in this loss and gives the solver its two classes.
    """
    from sklearn.linear_model import LogisticRegression

    sign_N = np.where(np.arange(len(difference)) % 2, -1.0, 1.0).astype(np.float32)
    model = LogisticRegression(C=c, fit_intercept=False, max_iter=1000)
    return np.asarray(model.fit(difference * sign_N[:, None], sign_N).coef_[0], np.float32)


def _cross_validate(difference: Array, group_N: np.ndarray, c: float) -> np.ndarray:
    """Each pair's score difference under a head that never saw its prompt, (N,)."""
    from sklearn.model_selection import GroupKFold

    score_N = np.zeros(len(difference))
    for train, test in GroupKFold(FOLDS).split(difference, groups=group_N):
        score_N[test] = difference[test] @ _bradley_terry(difference[train], c)
    return score_N


def _one_standard_error(tried: dict[float, np.ndarray]) -> float:
    """The strongest ridge whose agreement is within one standard error of the best (Breiman et al. 1984, 3.4.3)."""
    share = {c: float((score_N > 0).mean()) for c, score_N in tried.items()}
    best = max(share.values())
    error = (best * (1 - best) / len(next(iter(tried.values())))) ** 0.5
    return min(c for c, value in share.items() if value >= best - error)


def _fit_gate(origins: Sequence[tuple[int, Array]], sets: int) -> tuple[Array, Array]:
    """Weight (S, D) and bias (S,) of log p(set | prompt). Every origin of prompts counts alike, however many it has."""
    if sets == 1:
        return np.zeros((1, DIM), np.float32), np.zeros(1, np.float32)
    from sklearn.linear_model import LogisticRegression

    prompt_ND = np.concatenate([prompts for _, prompts in origins])
    size = [len(prompts) for _, prompts in origins]
    source_N = np.repeat([source for source, _ in origins], size)
    share_N = np.repeat([len(prompt_ND) / len(origins) / n for n in size], size)
    model = LogisticRegression(C=GATE_C, max_iter=1000).fit(prompt_ND, source_N, share_N)
    weight, bias = model.coef_, model.intercept_
    if sets == 2:  # one row of log-odds: the first set's logit is zero
        weight, bias = np.concatenate([0 * weight, weight]), np.concatenate([0 * bias, bias])
    return np.asarray(weight, np.float32), np.asarray(bias, np.float32)
