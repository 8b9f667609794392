"""`key.sub=value` of a command line, set in a recipe's plain tree."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from dualign.common.errors import UserError
from dualign.common.named import same_name
from dualign.common.yaml_text import parse_yaml
from dualign.config import foreign
from dualign.config.renamed import renamed


def overridden(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A plain tree with overrides applied. algo.name and rollout.engine are first: they start that system's section and
    that sampler's options afresh, and the other keys are meant for them. Raises UserError where a key leads nowhere."""
    tree = copy.deepcopy(tree)
    for override in sorted(overrides, key=lambda o: not o.startswith(("algo.name=", "rollout.engine="))):
        apply(tree, override)
    return tree


def apply(tree: dict[str, Any], override: str) -> None:
    """Sets one `key.sub=value` in a plain tree, in place. Raises UserError where the key leads nowhere."""
    key, sign, text = override.partition("=")
    if not sign or not key:
        raise UserError(f"override {override!r}: expected key.sub=value, for example train.lr=1e-5")
    *parents, last = renamed(key).split(".")
    node: Any = tree
    for part, below in zip(parents, [*parents, last][1:], strict=True):
        if isinstance(node, list):
            node = node[_position(node, part, override)]
        else:
            if node.get(part) is None:
                node[part] = [] if below.isdigit() else {}
            node = node[part]
        if not isinstance(node, dict | list):
            raise UserError(f"override {override!r}: {part} is a value, not a section")
    value = parse_yaml(text, f"override {override!r}")
    if key == "algo.name" and value != node.get("name") and not same_name(value, node.get("name")):
        tree["algo"] = {"name": value}
    elif key == "rollout.engine" and value != (held := node.get("engine", "hf")) and not same_name(value, held):
        node.pop("options", None)
        node["engine"] = value
    elif isinstance(node, list):
        node[_position(node, last, override)] = value
    else:
        node[last] = value


def _position(items: list[Any], part: str, override: str) -> int:
    if not part.isdigit() or int(part) >= len(items):
        named = "".join(f"; {hint}" for hint in foreign.hints(override.partition("=")[0]))
        raise UserError(f"override {override!r}: {part} is no position in a list of {len(items)}{named}")
    return int(part)
