"""Every key of a recipe, read off the models that check it: `dualign keys` and docs/configuration.md."""

from __future__ import annotations

import textwrap
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dualign.algos import ALGORITHMS, Algorithm
from dualign.annotate.endpoints import Endpoint
from dualign.annotate.registry import REWARDS
from dualign.annotate.settings import RewardSettings
from dualign.common.errors import UserError
from dualign.common.named import is_place, load_named
from dualign.config import Config
from dualign.rollout.settings import ENGINES, RolloutConfig

BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<", "multiple_of": "a multiple of"}
INTRODUCTION = """# Every key of a recipe

A recipe names what differs from these defaults; on the command line a key is set by `section.key=value`
(`reward.0.weight=2` is that of the first reward). The same list is printed by `dualign keys [SECTION ...]`.
"""


@dataclass(frozen=True)
class Key:
    name: str
    kind: str
    default: str
    meaning: str

    def __str__(self) -> str:
        default = self.default if self.default == "must be given" else f"default {self.default}"
        return f"({self.kind}; {default}){': ' if self.meaning else ''}{self.meaning}"


def sections() -> Iterator[tuple[str, list[Key]]]:
    """(heading, keys) of every section; of `algo` and `reward` one for each system and type."""
    for name, field in Config.model_fields.items():
        if name == "algo":
            for system, algorithm in ALGORITHMS.items():
                yield f"algo, name: {system}", list(_keys(algorithm, {"name"}))
        elif name == "reward":
            common = set(RewardSettings.model_fields)
            yield "reward.N, of every type", list(_keys(RewardSettings, {"type"}))
            yield "reward.N, of the types served, judge, preference", list(_keys(Endpoint, common))
            for kind, reward in REWARDS.items():
                yield f"reward.N, type: {kind}", list(_keys(reward, _shared(reward)))
        elif name == "rollout":
            yield name, list(_keys(RolloutConfig, {"options"}))
            for engine, settings in ENGINES.items():
                yield f"rollout.options, engine: {engine}", list(_keys(settings, set()))
        else:
            yield name, list(_keys(_model(field.annotation), set()))


def of_own(place: str) -> tuple[str, list[Key]]:
    """The keys of the class at FILE.py:NAME: a system, an engine, ... of the user's own."""
    found = load_named(place, "keys")
    if not (isinstance(found, type) and issubclass(found, BaseModel)):
        raise UserError(f"{place} has no keys: it is no class with settings")
    shared = {"name"} if issubclass(found, Algorithm) else _shared(found)
    return place, list(_keys(found, shared))


def _shared(kind: type[BaseModel]) -> set[str]:
    """What a reward's type has in common with others."""
    above = next((each for each in (Endpoint, RewardSettings) if issubclass(kind, each)), None)
    return set(above.model_fields) if above else set()


def matching(names: list[str]) -> list[tuple[str, list[Key]]]:
    """The sections that `names` name (each a section, a system or a reward's type), or all. Raises UserError."""
    own = [of_own(name) for name in names if is_place(name)]
    names = [name for name in names if not is_place(name)]
    every = [] if own and not names else list(sections())
    words = {heading: heading.replace(".N", "").replace(",", "").replace(".", " ").split() for heading, _ in every}
    for name in names:
        if not any(name in found for found in words.values()):
            raise UserError(f"no section, system or reward is called {name}; `dualign keys` has them all")
    return own + [(h, keys) for h, keys in every if not names or any(name in words[h] for name in names)]


def plain(keys: list[Key]) -> str:
    """For the terminal."""
    rows = [f"  {key.name:24} {key}".replace("`", "") for key in keys]
    return "\n".join(textwrap.fill(row, 120, subsequent_indent=" " * 6, break_on_hyphens=False) for row in rows)


def markdown() -> str:
    """docs/configuration.md"""
    parts = [INTRODUCTION]
    for heading, keys in sections():
        rows = [f"- `{key.name}` {key}" for key in keys]
        lines = [textwrap.fill(r, 120, subsequent_indent="  ", break_on_hyphens=False) for r in rows]
        parts.append("\n".join([f"## {heading}\n", *lines]) + "\n")
    return "\n".join(parts)


def _keys(model: type[BaseModel], without: set[str], prefix: str = "") -> Iterator[Key]:
    for name, field in model.model_fields.items():
        if name in without:
            continue
        nested = _model(field.annotation)
        if nested is not None:
            yield Key(f"{prefix}{name}", "a section, or none", _default(field), _meaning(field))
            yield from _keys(nested, set(), f"{prefix}{name}.")
        else:
            yield Key(f"{prefix}{name}", _kind(field), _default(field), _meaning(field))


def _kind(field: FieldInfo) -> str:
    bounds = [f"{sign} {getattr(m, key):g}" for m in field.metadata for key, sign in BOUNDS.items() if hasattr(m, key)]
    return " ".join([_type(field.annotation), ", ".join(bounds)]).strip()


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None))
    if origin is Annotated:
        return _type(arguments[0])
    if origin is list:
        return f"list ({_type(arguments[0])})"
    if origin is dict:
        return "mapping"
    words = {
        "str": "text",
        "bool": "true or false",
        "int": "whole number",
        "float": "number",
        "RewardSettings": "rewards",
    }
    name = str(getattr(annotation, "__name__", annotation))
    return words.get(name, name)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    value = field.get_default(call_default_factory=True)
    if value is None or value == "":
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def _meaning(field: FieldInfo) -> str:
    return field.description or ""


def _model(annotation: Any) -> Any:
    """The section that a field holds, if it holds one."""
    found = [a for a in _members(annotation) if isinstance(a, type) and issubclass(a, BaseModel)]
    return found[0] if found else None


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
