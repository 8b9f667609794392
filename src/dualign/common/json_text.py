"""JSON as every program reads it: no nan, no infinity, plain numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def finite(value: Any) -> Any:
    """As JSON knows it: null for nan and infinity, plain numbers for numpy's."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(inner) for key, inner in value.items()}
    if hasattr(value, "dtype"):
        return finite(value.item())
    return [finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def document(value: Any) -> str:
    """One document, for people to look at, too; paths are texts."""
    return json.dumps(finite(value), indent=1, ensure_ascii=False, allow_nan=False, default=str)
