"""How sure a number is: half widths of intervals, words where there is none, and what few draws may not say."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit

FEW = 20  # independent draws (prompts) below which no verdict, length control or price per point is given


def all_equal(values: ArrayLike) -> bool:
    """Whether values differ by no more than rounding: then they say nothing of how much others would differ."""
    x = np.asarray(values, float)
    return len(x) < 2 or bool(np.ptp(x) <= 1e-9 * np.abs(x).max())


def half_width(values: ArrayLike) -> float:
    """Half the width of the 95 % t-interval of the mean; nan for a single value and for equal ones: they have none."""
    x = np.asarray(values, float)
    if all_equal(x):
        return math.nan
    return float(stdtrit(len(x) - 1, 0.975) * x.std(ddof=1) / np.sqrt(len(x)))


def known(value: float | None) -> bool:
    """Whether there is a number: not None, nan or infinite."""
    return value is not None and math.isfinite(value)


def none_for_nan(record: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no nan."""
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in record.items()}


def plus_minus(value: float | None, half: float | None, n: int | None, form: str = "{:+.2f}") -> str:
    """`+0.50 ± 0.10`, `+0.50 (no interval, n=1)`, or a dash where there is no value."""
    if value is None or math.isnan(value):
        return "–"
    if half is not None and math.isfinite(half):
        return f"{form.format(value)} ± {form.replace('+', '').format(half)}"
    return f"{form.format(value)} {no_interval(n)}"


def bracket(e: Mapping[str, Any], form: str = "{:+.2f}", bound: str | None = None) -> str:
    """An estimate's record as `+0.50 [+0.40, +0.60]`, `+0.50 (no interval, n=1)`, or a dash."""
    value, low, high = e["value"], e["low"], e["high"]
    if not known(value):
        return "–"
    if not (known(low) and known(high)):
        return f"{form.format(value)} {no_interval(e.get('n'))}"
    return f"{form.format(value)} [{(bound or form).format(low)}, {(bound or form).format(high)}]"


def no_interval(n: int | None) -> str:
    return "(no interval)" if n is None else f"(no interval, n={n})"


def too_few(n: int) -> str:
    """Why something is not said of `n` prompts; empty where they are enough."""
    return (
        f"{'1 prompt is' if n == 1 else f'{n} prompts are'} too few for a verdict ({FEW} are needed)" if n < FEW else ""
    )
