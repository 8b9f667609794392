"""A reward's values against one another: less their mean, in their standard deviation."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import replace

from dualign.common.intervals import all_equal
from dualign.common.types import Label

RAW = "unnormalised"  # of a label's parts: the reward as it is without any normalisation


def normalised(values: Mapping[int, float], scope: Mapping[int, Hashable]) -> dict[int, float]:
    """(x − mean)/sd of each value among those of the same `scope`, with the sample's standard deviation (n − 1). Equal
    values, and one alone, give 0. Exact sums: the order of the values, and so the number of processes, says nothing."""
    members: dict[Hashable, list[int]] = {}
    for index in values:
        members.setdefault(scope[index], []).append(index)
    return {
        index: z
        for indices in members.values()
        for index, z in zip(indices, _standing([values[i] for i in indices]), strict=True)
    }


def unnormalised(label: Label) -> Label:
    """For whoever compares one batch with another: normalised, the mean of each is 0."""
    if label.value is None or RAW not in label.parts:
        return label
    return replace(label, value=label.parts[RAW], parts={k: v for k, v in label.parts.items() if k != RAW})


def _standing(values: list[float]) -> Iterable[float]:
    if all_equal(values):
        return [0.0] * len(values)
    mean = math.fsum(x / len(values) for x in values)
    largest = max(abs(x - mean) for x in values)  # so that no square overflows
    away = [(x - mean) / largest for x in values]
    sd = math.sqrt(math.fsum(d * d for d in away) / (len(values) - 1))
    return [d / sd for d in away]
