"""What a judge's agreement hides: biases beside people's own, what it confuses, and what that does to win rates."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dualign.annotate.agreement import Pair, longer, measure, side_of, wilson
from dualign.annotate.preference import Verdict
from dualign.common.errors import UserError
from dualign.eval.reliability import alpha, coincidences
from dualign.eval.statistics import Estimate, bootstrap, share

Values = Sequence[float | None]  # of a labeller, one per pair: a's advantage
SIDES = ("a", "b", "tie")
WORTH = {"a": 1.0, "tie": 0.5, "b": 0.0}  # of a
Z = 1.959964


def confusion(pairs: Sequence[Pair], values: Values) -> dict[str, dict[str, int]]:
    """How often the labeller says a, b, tie or nothing (absent), by what people say."""
    met: Counter[tuple[str, str]] = Counter(
        (p.human, "absent" if v is None else side_of(v)) for p, v in zip(pairs, values, strict=True)
    )
    return {human: {side: met[human, side] for side in (*SIDES, "absent")} for human in SIDES}


def nominal_alpha(pairs: Sequence[Pair], values: Values) -> Estimate:
    """Krippendorff's α of the labeller and people, over a, b and tie. Which response is called a is arbitrary, so each
    pair counts in both orientations, as for kappa."""
    at = {side: i for i, side in enumerate(SIDES)}
    turned = [at["b"], at["a"], at["tie"]]
    each = []
    for pair, value in zip(pairs, values, strict=True):
        if value is not None:
            unit = [at[pair.human], at[side_of(value)]]
            each.append(coincidences(unit, 3) + coincidences([turned[i] for i in unit], 3))
    return alpha(np.array(each), 1 - np.eye(3))


def people_alpha(pairs: Sequence[Pair]) -> Estimate:
    """Likewise of the people among themselves, where pairs have several votes."""
    each = []
    for pair in pairs:
        unit = [i for i, side in enumerate(SIDES) for _ in range((pair.votes or {}).get(side) or 0)]
        if len(unit) > 1:
            each.append(coincidences(unit, 3) + coincidences([[1, 0, 2][i] for i in unit], 3))
    return alpha(np.array(each), 1 - np.eye(3))


def position(verdicts: Sequence[Verdict]) -> Estimate:
    """Of the answers in both orders, the share that names what was shown first; 0.5 is no bias."""
    return share([v.named_first for v in verdicts if v.named_first is not None])


def length(pairs: Sequence[Pair], values: Values) -> Estimate:
    """P(the labeller prefers the longer answer) − P(people do), over pairs whose answers differ in length."""
    return _beyond_people(pairs, values, [len(p.a) - len(p.b) for p in pairs])


def own(pairs: Sequence[Pair], values: Values, model: str) -> Estimate:
    """P(the labeller prefers what `model` wrote) − P(people do), over pairs of which it wrote one."""
    mine = [[_same(name, model) for name in pair.models] for pair in pairs]
    return _beyond_people(pairs, values, [a - b for a, b in mine])


def _beyond_people(pairs: Sequence[Pair], values: Values, favours: Sequence[int]) -> Estimate:
    """Paired: people's own preference for it is no bias. `favours`: > 0 where it is a, < 0 where it is b."""
    judged = zip(pairs, values, favours, strict=True)
    return bootstrap(
        [(WORTH[side_of(v)] - WORTH[p.human]) * (1 if f > 0 else -1) for p, v, f in judged if v is not None and f]
    )


def _same(name: str | None, model: str) -> bool:
    """The last part of a hub's name is enough: OWNER/NAME and NAME are one model."""
    return name is not None and name.rpartition("/")[2].lower() == model.rpartition("/")[2].lower()


def length_rule(pairs: Sequence[Pair]) -> tuple[str, list[float | None]]:
    """The better of two rules that read nothing, by its name and its values: the longer answer, or where that sides
    with people on less than half of the pairs, the shorter one."""
    values = longer(pairs)
    if measure("", pairs, values).share < 0.5:
        return "shorter", [None if value is None else -value for value in values]
    return "longer", values


def over(pairs: Sequence[Pair], values: Values, others: Values) -> Estimate:
    """How much more often the labeller sides with people than another does, over the pairs that both labelled and on
    which people have a preference; a tie counts half."""
    both = zip(pairs, values, others, strict=True)
    return bootstrap([
        _credit(p, v) - _credit(p, o) for p, v, o in both if v is not None and o is not None and p.human != "tie"
    ])  # fmt: skip


def _credit(pair: Pair, value: float) -> float:
    side = side_of(value)
    return 0.5 if side == "tie" else float(side == pair.human)


# --- win rates under a judge of known error ---


@dataclass(frozen=True)
class Errors:
    """How often a judge sides with people, a tie counting half, and of how many pairs that is known. Which answer is
    called a is arbitrary in a file of pairs, so this is its sensitivity and its specificity in one."""

    agrees: float
    n: int

    def corrected(self, rate: Estimate) -> Estimate:
        """The win rate that people would give, of what the judge gives: (p + sp − 1)/(se + sp − 1), Rogan and Gladen
        (1978), within 0 and 1. Where ties count half it holds as well. The interval is the delta method's, of the win
        rate's own error and of that of `agrees`, which must be above 1/2."""
        s, d = self.agrees, 2 * self.agrees - 1
        value = (rate.value + s - 1) / d
        of_rate = ((rate.high - rate.low) / (2 * Z)) ** 2
        half = Z * math.sqrt(of_rate + (1 - 2 * value) ** 2 * s * (1 - s) / self.n) / d
        middle, low, high = (min(max(x, 0.0), 1.0) for x in (value, value - half, value + half))
        return Estimate(middle, low, high, rate.n)


def read_errors(path: Path) -> Any:
    """Raises UserError for what is no JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: expected what `dualign agreement --out` writes: {error}") from None


def errors_of(reports: Any, judge: Sequence[Mapping[str, Any]], where: str) -> Errors:
    """What `dualign agreement --out` wrote of the judge with these settings, over all its files. Raises UserError where
    it is not among them, and where it may be no better than chance."""
    if len(judge) != 1:
        raise UserError(f"{where}: the errors of one judge are known, and several rewards judge here")
    name = labeller_of(judge[0])
    try:
        rows = [row for report in reports for row in report["labellers"]]
        known = [(row["labeller"], row.get("rubric"), row["share"], row["pairs"]) for row in rows]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f"{where}: not what `dualign agreement --out` writes") from None
    mine = [(agrees, n) for labeller, rubric, agrees, n in known if (labeller, rubric) == name and n]
    if not mine:
        have = ", ".join(dict.fromkeys(_told(labeller, rubric) for labeller, rubric, *_ in known))
        raise UserError(f"{where}: knows nothing of {_told(*name)}, which judges here; it has {have}")
    n = sum(count for _, count in mine)
    found = Errors(sum(rate * count for rate, count in mine) / n, n)
    if not wilson(found.agrees * n, n)[0] > 0.5:
        raise UserError(
            f"{where}: {_told(*name)} sides with people on {found.agrees:.1%} of {n} pairs, which may be chance: no win "
            "rate of people's follows from its own"
        )
    return found


def labeller_of(settings: Mapping[str, Any]) -> tuple[str, str | None]:
    """What `dualign agreement` calls a judge by its settings, and its rubric."""
    kinds = {"judge": "AI reward", "preference": "AI preference"}
    kind = str(settings.get("type"))
    if kind in kinds:
        return f"{kinds[kind]} ({settings['model']})", settings["rubric"]
    return (f"head {Path(str(settings.get('path'))).stem}" if kind == "head" else kind), None


def _told(labeller: str, rubric: str | None) -> str:
    return f"{labeller} with rubric {rubric}" if rubric else labeller
