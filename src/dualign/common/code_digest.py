"""A digest of a Python function, so that another one under the same name is told from it.

Of its compiled code, which knows no comments and no lines, with what it was given: defaults, what it closes over, and
the functions, classes and plain values of the user's own modules that it names. Installed packages count by name alone.
What the code itself changes as it runs (counters, lists that it appends to) is its state, and no part of what it is.
"""

from __future__ import annotations

import dis
import functools
import hashlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from dualign.common.code_files import find, is_users, with_imports

PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), range, slice, Path)
LOADS = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF", "LOAD_ATTR", "LOAD_FROM_DICT_OR_DEREF"}
LOADS |= {"LOAD_METHOD"}
STORES = {"STORE_GLOBAL", "STORE_DEREF", "STORE_ATTR"}
CHANGES = {"STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"}
MUTATORS = {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "put"}
MUTATORS |= {"remove", "reverse", "setdefault", "sort", "update"}


def of_function(function: Any) -> str:
    """PYTHON:SHA256, of any object that does the labelling. Digests of different Pythons cannot be compared: each
    compiles in its own way. Empty where a value that it holds cannot be looked into."""
    version = f"{sys.implementation.name}{sys.version_info.major}.{sys.version_info.minor}"
    try:
        return f"{version}:{_described(function)[0]}"
    except Exception:  # a user's object may do anything where it is asked for its parts, or is nested too deep
        return ""


def modules_of(function: Any) -> dict[str, Path]:
    """The files of the user's own modules that the function, or code that it names, refers to as modules, with what
    these import."""
    try:
        return with_imports(_described(function)[1])
    except Exception:
        return {}


def _described(function: Any) -> tuple[str, list[Path]]:
    first = _Description(_State())
    first.of(function, root=True)  # finds what changes, wherever it is named
    second = _Description(first.found)
    return second.of(function, root=True), second.modules


class _Description:
    """What is the same for the same function, part by part."""

    def __init__(self, state: _State) -> None:
        self.state, self.found = state, _State()
        self.modules: list[Path] = []
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
            if isinstance(value, dict):
                yield from sorted(f"{self.of(key)}: {self.of(item)}" for key, item in value.items())
            else:
                yield from sorted(map(self.of, value))
        elif isinstance(value, FunctionType):
            yield from self._function(value) if root or is_users(value.__code__.co_filename) else _name(value)
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
            yield from self._class(value) if is_users(_file(value)) else _name(value)
        elif callable(wrapped := inspect.getattr_static(value, "__wrapped__", None)):  # functools.cache and its like
            yield self.of(wrapped, root)
        elif isinstance(value, ModuleType | BuiltinFunctionType) or not is_users(_file(type(value))):
            if isinstance(value, ModuleType) and is_users(getattr(value, "__file__", None)):
                self.modules.append(Path(str(value.__file__)))
            yield from _name(type(value) if inspect.getattr_static(value, "__name__", None) is None else value)
        else:
            yield from self._object(value)

    def _function(self, f: FunctionType) -> Iterator[str]:
        yield from self._code(f.__code__)
        yield self.of((f.__defaults__, f.__kwdefaults__))
        if f.__name__ != "__init__":  # which sets what an object is, not what becomes of it
            self.found.add(f.__code__)
        for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
            if name not in self.state.assigned:
                yield f"closes over {name}"
                yield self._held(_inside(cell), name)
        names, imported = _globals(f.__code__)
        for name in sorted(names - self.state.assigned):
            if name in f.__globals__:
                yield f"global {name}"
                yield self._held(f.__globals__[name], name)
        near = Path(f.__code__.co_filename).parent
        self.modules += [file for name in sorted(imported) for file in find(name, near).values()]

    def _held(self, value: Any, name: str) -> str:
        """What is under `name`: of a container that the code changes in place, its type alone."""
        return self.of(type(value)) if name in self.state.mutated and _is_container(value) else self.of(value)

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
        for name, attribute in sorted(getattr(value, "__dict__", {}).items()):
            if name not in self.state.attributes:
                yield f"has {name}"
                yield self._held(attribute, name)


@dataclass
class _State:
    """The names of what code assigns to outside itself, variables and attributes, and of what it changes in place."""

    assigned: set[str] = field(default_factory=set)
    attributes: set[str] = field(default_factory=set)
    mutated: set[str] = field(default_factory=set)

    def add(self, code: CodeType) -> None:
        for part in _parts(code):
            steps = [s for s in dis.get_instructions(part) if s.opname in LOADS | STORES | CHANGES]
            changed = {_start(s) for s in steps if s.opname in CHANGES or s.argval in MUTATORS}
            for step in steps:
                if step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars):
                    self.assigned.add(str(step.argval))
                elif step.opname == "STORE_ATTR":
                    self.attributes.add(str(step.argval))
                elif step.opname in LOADS and _start(step) in changed:
                    self.mutated.add(str(step.argval))


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


def _globals(code: CodeType) -> tuple[set[str], set[str]]:
    """The names that are looked up in the module, and the modules that are imported within."""
    steps = [step for part in _parts(code) for step in dis.get_instructions(part)]
    looked_up = {str(s.argval) for s in steps if s.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return looked_up, {str(s.argval) for s in steps if s.opname == "IMPORT_NAME"}


def _start(step: dis.Instruction) -> tuple[int | None, int | None]:
    """Where the expression begins that the step is of: `seen` in all steps of `seen[key].d[other] = ...`."""
    at = step.positions
    return (at.lineno, at.col_offset) if at else (None, None)


def _is_container(value: Any) -> bool:
    return not isinstance(value, (*PLAIN, type, FunctionType, MethodType, ModuleType)) and not is_users(
        _file(type(value))
    )


def _file(kind: type) -> str | None:
    """The file that a class is of; None for one of Python's own."""
    module = sys.modules.get(kind.__module__)
    return None if kind.__module__ == "builtins" else str(getattr(module, "__file__", None) or "<user>")


def code_digest() -> str:
    """A digest of this package's modules: a version number says too little about a checkout."""
    package = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]
