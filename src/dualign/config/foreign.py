"""What other libraries call a setting (`foreign.yaml`), for the error that says what a key is called here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class Foreign:
    """`key` of `library` is `ours` here (None: there is none); `note`: what behaves otherwise."""

    library: str
    key: str
    ours: str | None
    note: str | None = None

    def __str__(self) -> str:
        told = f" ({self.note})" if self.note and self.ours else ""
        if self.ours is None:
            return f"{self.library}'s {self.key} has no key here: {self.note}"
        return f"{self.library}'s {self.key} is {self.ours} here{told}"


@cache
def table() -> tuple[Foreign, ...]:
    tree = yaml.safe_load((resources.files("dualign.config") / "foreign.yaml").read_text(encoding="utf-8"))
    return tuple(Foreign(library, key, **said) for library, keys in tree.items() for key, said in keys.items())


def hints(path: str, value: Any = None) -> list[str]:
    """What an unknown key is called here, in words; of an unknown section, each of its keys that is known. A key that
    is called so here, too, is another system's."""
    found = {key: named for key in _leaves(path, value) if (named := _named(key))}
    return list(dict.fromkeys(str(named) for key, named in found.items() if named.ours != key))


def _leaves(path: str, value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}", inner)
    else:
        yield path


def _named(path: str) -> Foreign | None:
    """The entry that `path` is: by its whole name; else by its end, or as the end of a longer one."""
    parts = path.split(".")
    ends = [".".join(parts[i:]) for i in range(len(parts))]
    known = {each.key: each for each in reversed(table())}
    found = next((known[end] for end in ends if end in known), None)
    longer = (each for each in table() if len(parts) > 1 and each.key.endswith(f".{path}"))
    return found or next(longer, None)
