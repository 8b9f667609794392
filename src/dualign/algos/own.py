"""A system of the user's own: what its methods raise is said with its place, and what they return is looked at."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from dualign.algos.base import Algorithm, Batch
from dualign.common.errors import UserError, out_of_memory
from dualign.common.named import run_own


def guarded(kind: type[Algorithm], place: str) -> type[Algorithm]:
    """`kind`, found at `place`: its methods raise UserError for what is amiss. Raises ValueError where it has no loss."""
    if kind.loss is Algorithm.loss:
        raise ValueError(f"{place} has no method `loss`")
    for method, check in {"prepare": _prepared, "refresh": _per_row, "denominator": None, "loss": _summed}.items():
        if not hasattr(getattr(kind, method), "guarded"):
            setattr(kind, method, _guarded(getattr(kind, method), f"algo {place}: {method}", check))
    return kind


def _guarded(method: Callable[..., Any], what: str, check: Callable[[Any, Batch], str] | None) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Algorithm, *args: Any, **kwargs: Any) -> Any:
        result = run_own(what, lambda: method(self, *args, **kwargs), passes=out_of_memory)  # the loop has an answer
        batch = next(x for x in (*args, *kwargs.values()) if isinstance(x, Batch))
        if check and (wrong := check(result, batch)):
            raise UserError(f"{what} {wrong}")
        return result

    call.guarded = True  # type: ignore[attr-defined]
    return call


def _prepared(result: Any, batch: Batch) -> str:
    if not (isinstance(result, tuple) and len(result) == 2):
        return f"returned a {type(result).__name__}; expected (columns, numbers to log)"
    columns, numbers = result
    if not isinstance(numbers, Mapping):
        return f"returned a {type(numbers).__name__} for its numbers to log; expected {{name: float}}"
    for name, value in numbers.items():
        if not isinstance(value, float | int):
            return f"returned the number {name!r} as a {type(value).__name__}; expected a float"
    return _per_row(columns, batch)


def _per_row(columns: Any, batch: Batch) -> str:
    if not isinstance(columns, Mapping):
        return f"returned a {type(columns).__name__} for its columns; expected {{name: tensor}}"
    for name, column in columns.items():
        if not isinstance(column, Tensor) or column.shape[:1] != (len(batch),):
            found = f"of shape {tuple(column.shape)}" if isinstance(column, Tensor) else f"a {type(column).__name__}"
            return f"returned the column {name!r} {found}; expected a tensor with a value for each of {len(batch)} rows"
    return ""


def _summed(result: Any, batch: Batch) -> str:
    if not (isinstance(result, tuple) and len(result) == 2):
        return f"returned a {type(result).__name__}; expected (the sum of the rows' losses, columns to log)"
    if not isinstance(result[0], Tensor) or result[0].dim():
        shape = f" of shape {tuple(result[0].shape)}" if isinstance(result[0], Tensor) else ""
        return f"returned a {type(result[0]).__name__}{shape} as its loss; expected one number: the sum over its rows"
    return _per_row(result[1], batch)
