"""The house stays one in which things are found: rooms, sizes, no circles. (test_docs.py holds that imports point down.)"""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import dualign

SOURCE = Path(dualign.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ENTRIES, LINES, FUNCTION = 14, 350, 70
NOT_ROOMS = {"__init__.py", "__main__.py", "py.typed", "__pycache__"}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")


@cache
def imports() -> dict[str, set[str]]:
    """The modules that each module imports when it is imported itself: not those within functions, or for types alone."""
    names = {name_of(file) for file in FILES}
    found: dict[str, set[str]] = {}
    for file in FILES:
        found[name_of(file)] = set()
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dualign":
                inner = {f"{node.module}.{a.name}" for a in node.names} & names
                found[name_of(file)] |= inner or {node.module}
    return found


def test_few_rooms_stand_at_the_entrance():
    assert len({path.name for path in SOURCE.iterdir()} - NOT_ROOMS) <= ENTRIES


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_files_and_functions_are_read_in_one_sitting(file):
    text = file.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LINES
    long = [
        (node.name, node.end_lineno - node.lineno + 1)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= FUNCTION
    ]
    assert long == []


def test_no_module_imports_itself_by_way_of_others():
    open_, done = [], set()

    def visit(module: str) -> None:
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for other in sorted(imports().get(module, ())):
            visit(other)
        open_.pop()
        done.add(module)

    for module in sorted(imports()):
        visit(module)
    assert len(done) >= len(FILES)


def test_systems_read_as_their_equations():
    """A property that only returns a constant is a class attribute."""
    constant = [
        f"{file.name}: {node.name}"
        for file in (SOURCE / "algos").glob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
        and any(isinstance(d, ast.Name) and d.id == "property" for d in node.decorator_list)
        and isinstance(node.body[-1], ast.Return)
        and isinstance(node.body[-1].value, ast.Constant)
        and len(node.body) == 1
    ]
    assert constant == []
