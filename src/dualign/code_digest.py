"""A digest of a Python function, so that another one under the same name is told from it.

Of its compiled code, which knows no comments and no lines, with what it was given: defaults, what it closes over, and
the functions, classes and plain values of the user's own modules that it names. Installed packages count by name alone.
What the code itself changes as it runs (counters, lists that it appends to) is its state, and no part of what it is.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice, Path)
LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_ATTR", "LOAD_FROM_DICT_OR_DEREF"}
STORES = {"STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR", "STORE_NAME"}
MUTATORS = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "put"}
MUTATORS |= {"remove", "reverse", "setdefault", "sort", "update"}
CHANGES = {"STORE_SUBSCR", "DELETE_SUBSCR", "COPY", "DUP_TOP_TWO"}  # after a name and a key: `seen[key] = ...`, `+=`


def of_function(function: Callable[..., Any]) -> str:
    """PYTHON:SHA256. Digests of different Pythons cannot be compared: each compiles in its own way."""
    version = f"{sys.implementation.name}{sys.version_info.major}.{sys.version_info.minor}"
    return f"{version}:{_Description().of(function, root=True)}"


class _Description:
    """What is the same for the same function, part by part."""

    def __init__(self) -> None:
        self.done: dict[int, tuple[Any, str]] = {}  # by address, which holds only while the value is held on to

    def of(self, value: Any, root: bool = False) -> str:
        """One line for a value: its text where it is plain, else a digest."""
        if isinstance(value, PLAIN):
            return f"{type(value).__name__} {value!r}"
        if id(value) not in self.done:
            self.done[id(value)] = value, "again"  # where it names itself
            text = "\n".join(self._known(value, root))
            self.done[id(value)] = value, hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        return self.done[id(value)][1]

    def _known(self, value: Any, root: bool) -> Iterator[str]:
        if isinstance(value, tuple | list):
            yield f"{type(value).__name__} of {len(value)}"
            for item in value:
                yield self.of(item)
        elif isinstance(value, set | frozenset | dict):
            yield f"{type(value).__name__} of {len(value)}"
            items = value.items() if isinstance(value, dict) else value
            yield from sorted(self.of(item) for item in items)
        elif isinstance(value, FunctionType):
            yield from self._function(value) if root or _is_users(value.__code__.co_filename) else _name(value)
        elif isinstance(value, MethodType):
            yield self.of(value.__func__, root)
            yield self.of(value.__self__)
        elif isinstance(value, staticmethod | classmethod):
            yield self.of(value.__func__)
        elif isinstance(value, property):
            yield self.of((value.fget, value.fset))
        elif isinstance(value, functools.partial):
            yield self.of((value.func, value.args, value.keywords), root)
        elif isinstance(value, re.Pattern):
            yield self.of((value.pattern, value.flags))
        elif isinstance(value, np.ndarray) and value.dtype != object:
            yield f"array {value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        elif isinstance(value, type):
            yield from self._class(value) if _is_users(_file(value)) else _name(value)
        elif (wrapped := getattr(value, "__wrapped__", None)) is not None:  # functools.cache and its like
            yield self.of(wrapped, root)
        elif isinstance(value, ModuleType | BuiltinFunctionType) or not _is_users(_file(type(value))):
            yield from _name(value if hasattr(value, "__name__") else type(value))
        else:
            yield from self._object(value)

    def _function(self, f: FunctionType) -> Iterator[str]:
        yield from self._code(f.__code__)
        yield self.of((f.__defaults__, f.__kwdefaults__))
        state = _state(f.__code__)
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if name not in state:
                yield f"closes over {name}"
                yield self.of(_inside(cell))
        for name in sorted(_globals(f.__code__) - state):
            if name in f.__globals__:
                yield f"global {name}"
                yield self.of(f.__globals__[name])

    def _code(self, code: CodeType) -> Iterator[str]:
        yield f"code {code.co_code.hex()} {getattr(code, 'co_exceptiontable', b'').hex()}"
        yield f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_flags} {code.co_names} {code.co_varnames}"
        yield f"{code.co_freevars} {code.co_cellvars}"
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from self._code(constant)
            else:
                yield self.of(constant)

    def _class(self, kind: type) -> Iterator[str]:
        yield f"class {kind.__qualname__}"
        for base in kind.__bases__:
            yield self.of(base)
        for name, member in sorted(vars(kind).items()):
            if not (name.startswith("__") and not callable(member)) and name not in ("__dict__", "__weakref__"):
                yield name
                yield self.of(member)

    def _object(self, value: Any) -> Iterator[str]:
        yield self.of(type(value))
        methods = [m for kind in type(value).__mro__ for m in vars(kind).values() if isinstance(m, FunctionType)]
        state = set().union(*(_state(m.__code__) for m in methods if m.__name__ != "__init__"))
        for name, attribute in sorted(getattr(value, "__dict__", {}).items()):
            if name not in state:
                yield f"has {name}"
                yield self.of(attribute)


def _name(value: Any) -> Iterator[str]:
    yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', None) or value.__name__}"


def _inside(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # nothing was assigned to it yet
        return None


def _parts(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _parts(constant)


def _globals(code: CodeType) -> set[str]:
    """The names that are looked up in the module."""
    return {
        str(step.argval)
        for part in _parts(code)
        for step in dis.get_instructions(part)
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")
    }


def _state(code: CodeType) -> set[str]:
    """The names of what the code assigns to, or changes in place, outside itself."""
    found = set()
    for part in _parts(code):
        steps = [s for s in dis.get_instructions(part) if s.opname not in ("CACHE", "PRECALL", "PUSH_NULL")]
        for i, step in enumerate(steps):
            after = [s.opname for s in steps[i + 2 : i + 3]]
            called = steps[i + 1].argval if i + 1 < len(steps) and steps[i + 1].opname.startswith("LOAD_") else None
            mutated = called in MUTATORS or bool(CHANGES & set(after))
            if step.opname in STORES or (step.opname in LOADS and mutated):
                found.add(str(step.argval))
    return found


@functools.cache
def _installed() -> tuple[str, ...]:
    paths = sysconfig.get_paths()
    return tuple(paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib"))


def _is_users(file: str | None) -> bool:
    return file is not None and not file.startswith((*_installed(), "<frozen"))


def _file(kind: type) -> str | None:
    """The file that a class is of; None for one of Python's own."""
    module = sys.modules.get(kind.__module__)
    return None if kind.__module__ == "builtins" else str(getattr(module, "__file__", None) or "<user>")
