"""The user's own modules that a file of Python imports, by what it says; nothing is imported to find them."""

from __future__ import annotations

import ast
import functools
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

PACKAGE = f"{Path(__file__).parents[1]}/"
BOUND = 500  # files that are followed


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def is_users(file: str | None) -> bool:
    """Whether a file of code is neither Python's nor an installed package's."""
    return file is not None and not file.startswith((*_installed(), "<frozen"))


def _is_followed(file: Path) -> bool:
    path = str(file)
    return is_users(path) and not path.startswith(PACKAGE) and not {"site-packages", "dist-packages"} & set(file.parts)


def with_imports(files: Iterable[Path]) -> dict[str, Path]:
    """Modules and what they import, transitively, as far as these are the user's: by their place in the folder that they
    are imported from."""
    found: dict[str, Path] = {}
    waiting = [(file.name, file.absolute()) for file in files]
    while waiting and len(found) < BOUND:
        name, file = waiting.pop()
        if file not in found.values() and file.is_file() and _is_followed(file):
            found[name if name not in found else f"{file.parent.name}/{name}"] = file
            waiting += _imports(file)
    return found


def find(name: str, near: Path) -> dict[str, Path]:
    """The files of the module `name`, with the packages that it is in, as seen from a file in the folder `near`."""
    parts = name.split(".")
    if parts[0] in sys.stdlib_module_names:
        return {}
    for folder in (near, Path.cwd(), *(Path(entry) for entry in sys.path if entry and is_users(entry))):
        found = {}
        for i in range(1, len(parts) + 1):
            inside = folder.joinpath(*parts[:i])
            for path in (inside.with_suffix(".py"), inside / "__init__.py"):
                if path.is_file():
                    found[str(path.relative_to(folder))] = path.absolute()
        if found:
            return found
    return {}


def _imports(file: Path) -> Iterator[tuple[str, Path]]:
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):  # whoever imports it says so
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names, near = [alias.name for alias in node.names], file.parent
        elif isinstance(node, ast.ImportFrom):
            near = file.parents[min(max(node.level - 1, 0), len(file.parents) - 1)]
            module = [node.module] if node.module else []
            names = [*module, *(".".join([*module, alias.name]) for alias in node.names)]
        else:
            continue
        for name in names:
            yield from find(name, near).items()
