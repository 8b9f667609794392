"""Keys that had other names before: they are still read, with a word."""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

log = logging.getLogger(__name__)
RENAMED = {
    "rollout.rows": "rollout.options.decode_batch_size",
    "rollout.cuda_graphs": "rollout.options.cuda_graphs",
}


def renamed(key: str) -> str:
    """The name that a key has now."""
    if key in RENAMED:
        _tell(key)
    return RENAMED.get(key, key)


@cache
def _tell(key: str) -> None:
    """Once: a grid reads its recipe for every run."""
    log.warning("note: %s is now %s", key, RENAMED[key])


def with_new_names(tree: dict[str, Any], stored: bool = False) -> dict[str, Any]:
    """A recipe's plain tree with the names of now. Where a key is given by both names, that of now counts. `stored`: in a
    run's folder, where nobody is to change it."""
    for old, new in RENAMED.items():
        section, _, key = old.rpartition(".")
        held = tree.get(section)
        if not isinstance(held, dict) or key not in held:
            continue
        if not stored:
            _tell(old)
        held = dict(held)
        value = held.pop(key)
        tree = {**tree, section: held}
        inner, _, name = new.removeprefix(f"{section}.").rpartition(".")
        below = held.get(inner) or {}
        if isinstance(below, dict):
            held[inner] = {name: value, **below}
    return tree
