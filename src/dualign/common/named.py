"""Code of one's own by its place: FILE.py:NAME or package.module:NAME."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

from dualign.common.errors import StopRun, UserError
from dualign.common.paths import path_of

X = TypeVar("X")
OURS = f"{Path(__file__).parents[1]}{os.sep}"
LIBRARIES = tuple(f"{sysconfig.get_path(kind)}{os.sep}" for kind in ("stdlib", "purelib", "platlib"))


def is_place(text: str) -> bool:
    """Whether a text names something in a file or module, and no thing of ours."""
    place, sign, name = text.rpartition(":")
    return (
        bool(sign) and name.isidentifier() and (place.endswith(".py") or all(map(str.isidentifier, place.split("."))))
    )


def same_name(old: object, new: object) -> bool:
    """Whether two texts are places of one name: its file may have moved."""
    if not (isinstance(old, str) and isinstance(new, str) and is_place(old) and is_place(new)):
        return False
    return old.rpartition(":")[2] == new.rpartition(":")[2]


def load_named(path: str, what: str) -> Any:
    """What stands at FILE.py:NAME or package.module:NAME. `what`: the key and kind of thing that is looked for, for
    people. Raises UserError naming what is missing, or what importing it raised."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UserError(f"{what} {path!r}: expected FILE.py:NAME or package.module:NAME")
    try:
        module = _load_file(path_of(place), what) if place.endswith(".py") else _load_module(place)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} {path}: importing it raised {type(error).__name__}: {error}") from error
    found = getattr(module, name, None)
    if found is None:
        near = difflib.get_close_matches(name, [k for k, v in vars(module).items() if callable(v)], 1)
        raise UserError(f"{what}: {place} has no {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    return found


def _load_file(file: Path, what: str) -> ModuleType:
    if not file.is_file():
        raise UserError(f"{what}: no such file {file}")
    importable(file.resolve().parent)  # it may import its neighbours
    spec = importlib.util.spec_from_file_location(f"dualign_user_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses, pydantic and pickle look there
    spec.loader.exec_module(module)
    return module


def _load_module(name: str) -> ModuleType:
    importable(Path(os.getcwd()))
    return importlib.import_module(name)


def importable(folder: Path) -> None:
    """From here on, modules in `folder` can be imported by name."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def run_own(what: str, work: Callable[[], X], passes: Callable[[Exception], bool] = lambda error: False) -> X:
    """What `work`, code of the user's own, returns. What it raises becomes a UserError that says of `what`, and where;
    but our own errors, and those that `passes` lets through."""
    try:
        return work()
    except (UserError, StopRun):
        raise
    except Exception as error:
        if passes(error):
            raise
        raise UserError(f"{what} raised {type(error).__name__}: {error}{place_of(error)}") from error


def place_of(error: BaseException) -> str:
    """Where it was raised: the last line of the user's own code, else of a library, as far as that is not ours."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((OURS, "<"))]
    frames = [f for f in frames if not f.filename.startswith(LIBRARIES)] or frames
    return f", {frames[-1].filename} line {frames[-1].lineno}" if frames else ""


def class_of(name: str, known: Mapping[str, type[X]], kind: type[X], hint: str = "") -> type[X]:
    """One of ours by its name, or the user's own at FILE.py:NAME, which must be a `kind` (`hint`: what to do with what
    is none). Raises ValueError, for whoever checks a configuration."""
    if name in known:
        return known[name]
    if not is_place(name):
        near = difflib.get_close_matches(name.lower(), known, 1, 0.4)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"no {name!r}{meant} (one of {', '.join(known)}, or one of your own: FILE.py:NAME)")
    try:
        found = load_named(name, "its code")
    except UserError as error:
        raise ValueError(str(error)) from None
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise ValueError(f"{name} is no subclass of {kind.__module__}.{kind.__name__}{hint}")
    return found
