"""How well labels agree with people, and with each other (ICLR Tables 6 and 7, v1 Tables 4 and 5). Pure arithmetic.

A labelled pair is (a, b) with what people preferred. A labeller gives a number per pair: positive for a, negative for
b, 0 for a tie, None where it has no label. Pairs that people call a tie, and pairs without a label, are left out of the
share and counted.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dualign.annotate.base import Annotator, Item, label_all
from dualign.annotate.preference import Verdict
from dualign.annotate.told import say_absent
from dualign.common.types import Prompt

Human = Literal["a", "b", "tie"]


@dataclass(frozen=True)
class Pair:
    id: str
    prompt: Prompt
    a: str
    b: str
    human: Human
    votes: Mapping[str, int] | None = None  # how many people voted a, b, tie
    models: tuple[str | None, str | None] = (None, None)  # who wrote a and b, where the file says so


@dataclass(frozen=True)
class Agreement:
    """`share`: of the pairs on which people have a preference, those where the labeller has the same; a tie of the
    labeller counts half. `low`, `high`: 95 % interval. `kappa`: Cohen's, over a, b and tie."""

    labeller: str
    pairs: int
    share: float
    low: float
    high: float
    ties: float  # share of ties among its labels
    kappa: float
    absent: int = 0
    human_ties: int = 0


@dataclass(frozen=True)
class Orders:
    """An AI preference asked in both orders (v1 Table 5). Shares of the pairs with both answers."""

    pairs: int
    preferred_first: float  # agreement with people when their choice is shown first
    preferred_second: float
    first_named: float  # of all answers, those that name what was shown first; 0.5 is no bias
    consistent: float  # pairs where both orders name the same response


def measure(labeller: str, pairs: Sequence[Pair], values: Sequence[float | None]) -> Agreement:
    """Agreement of `values` (one per pair: a's advantage) with people."""
    judged = [(pair.human, side_of(value)) for pair, value in zip(pairs, values, strict=True) if value is not None]
    decided = [(human, side) for human, side in judged if human != "tie"]
    credit = math.fsum(0.5 if side == "tie" else float(side == human) for human, side in decided)
    low, high = wilson(credit, len(decided))
    ties = sum(side == "tie" for _, side in judged)
    return Agreement(
        labeller,
        len(decided),
        credit / len(decided) if decided else math.nan,
        low,
        high,
        ties / len(judged) if judged else math.nan,
        kappa(judged),
        absent=len(pairs) - len(judged),
        human_ties=len(judged) - len(decided),
    )


def wilson(successes: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. With half successes (ties) it is a little too wide, never too narrow."""
    if n == 0:
        return math.nan, math.nan
    p, d = successes / n, 1 + z * z / n
    middle, half = (p + z * z / (2 * n)) / d, z / d * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def kappa(judged: Sequence[tuple[str, str]]) -> float:
    """Cohen's kappa over a, b and tie. Which response is called a is arbitrary (in many files it is always the chosen
    one), so each pair counts in both orientations: κ = (p_o − p_e)/(1 − p_e) with p_e = (1−h)(1−t)/2 + h·t, where h and
    t are the shares of ties among people's labels and the labeller's."""
    if not judged:
        return math.nan
    n = len(judged)
    observed = sum(human == side for human, side in judged) / n
    h, t = sum(human == "tie" for human, _ in judged) / n, sum(side == "tie" for _, side in judged) / n
    chance = (1 - h) * (1 - t) / 2 + h * t
    return (observed - chance) / (1 - chance) if chance < 1 else math.nan


def by_order(pairs: Sequence[Pair], verdicts: Sequence[Verdict]) -> Orders:
    """Agreement by which response was shown first."""
    first = second = consistent = decided = n = 0
    named = 0.0
    for pair, verdict in zip(pairs, verdicts, strict=True):
        if verdict.named_first is None:
            continue
        n += 1
        named += verdict.named_first
        consistent += verdict.ab == verdict.ba
        if pair.human == "tie":
            continue
        decided += 1
        shown_first, shown_second = (verdict.ab, verdict.ba) if pair.human == "a" else (verdict.ba, verdict.ab)
        first += shown_first == pair.human
        second += shown_second == pair.human
    share = [x / d if d else math.nan for x, d in ((first, decided), (second, decided), (named, n), (consistent, n))]
    return Orders(n, *share)


def longer(pairs: Sequence[Pair]) -> list[float | None]:
    """The baseline that reads nothing: the longer answer, in characters."""
    return [float(len(pair.a) - len(pair.b)) for pair in pairs]


def human_ceiling(pairs: Sequence[Pair]) -> Agreement | None:
    """One person against the others of the same pair: each voter is held against the majority of the rest, whose draws
    are broken at random (in expectation). None where no pair has several votes."""
    n = ties = voters = held = 0
    credit = exact = rest_ties = 0.0
    for pair in pairs:
        votes = Counter({side: count for side, count in (pair.votes or {}).items() if count})
        if votes.total() < 2:
            continue
        before = held
        for vote, count in votes.items():
            rest = votes - Counter([vote])
            tops = [side for side, most in rest.items() if most == max(rest.values())]
            voters += count
            ties += count * (vote == "tie")
            exact += count * (vote in tops) / len(tops)
            decided = [side for side in tops if side != "tie"]
            if decided:
                held += count
                credit += count * (0.5 if vote == "tie" else (vote in decided) / len(decided))
            rest_ties += count * (0.0 if "tie" not in tops else 1 / len(tops))
        n += held > before
    if not held:
        return None
    share = credit / held
    # people of one pair are not independent: pairs are counted, not votes, and of them those that weigh in
    low, high = wilson(share * n, n)
    tie_share, rest_share = ties / voters, rest_ties / voters
    chance = (1 - tie_share) * (1 - rest_share) / 2 + tie_share * rest_share
    person = "one person"
    return Agreement(person, n, share, low, high, tie_share, (exact / voters - chance) / (1 - chance))


def score_pairs(annotator: Annotator, pairs: Sequence[Pair]) -> list[float | None]:
    """Any annotator of single completions (a judge, a reward head) as a labeller of pairs: a's reward less b's."""
    items = [
        Item(2 * i + j, i, pair.prompt, text) for i, pair in enumerate(pairs) for j, text in enumerate((pair.a, pair.b))
    ]
    labels = label_all(annotator, items)
    say_absent(annotator.name, labels)
    values = [label.value for label in labels]
    return [None if a is None or b is None else a - b for a, b in zip(values[::2], values[1::2], strict=True)]


@dataclass(frozen=True)
class Granularity:
    """Pearson's r between two sets of rewards: over all rows that both labelled, and over the rows of pairs that the
    first set calls a tie (ICLR Table 7)."""

    rows: int
    r: float
    tied_rows: int
    r_tied: float


def granularity(first: Mapping[tuple[str, str], float], second: Mapping[tuple[str, str], float]) -> Granularity:
    """Rewards by (row id, response name)."""
    common = [key for key in first if key in second]
    responses: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key in common:
        responses[key[0]].append(key)
    tied = [k for keys in responses.values() if len(keys) > 1 and len({first[k] for k in keys}) == 1 for k in keys]
    both = [pearson((first[k] for k in keys), (second[k] for k in keys)) for keys in (common, tied)]
    return Granularity(len(common), both[0], len(tied), both[1])


def pearson(x: Iterable[float], y: Iterable[float]) -> float:
    """Pearson's r; nan where either side does not vary."""
    import numpy as np

    xs, ys = np.asarray(list(x), float), np.asarray(list(y), float)
    if len(xs) < 2 or xs.std() == 0 or ys.std() == 0:
        return math.nan
    return float(np.corrcoef(xs, ys)[0, 1])


def side_of(value: float) -> Human:
    return "tie" if value == 0 else "a" if value > 0 else "b"
