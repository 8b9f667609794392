"""The documents name only what exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dualign.algos import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
EQUATIONS = ROOT / "docs" / "equations.md"
REFERENCE = re.compile(r"`([\w/]+\.py)::([\w.]+)`")


def definitions(path: Path) -> set[str]:
    """Functions, classes and methods of a file: `f`, `C`, `C.f`."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return names


def test_every_reference_exists() -> None:
    references = set(REFERENCE.findall(EQUATIONS.read_text(encoding="utf-8")))
    assert len(references) > 40
    missing = []
    for file, name in sorted(references):
        path = ROOT / "tests" / "algos" / file if "test_" in file else ROOT / "src" / "dualign" / "algos" / file
        if not path.is_file() or name not in definitions(path):
            missing.append(f"{file}::{name}")
    assert missing == []


@pytest.mark.parametrize("system", sorted(set(ALGORITHMS.values()), key=lambda s: s.__name__))
def test_every_system_has_its_entry(system: type) -> None:
    """The class, or the function it defines, is named as the place of some equation, beside a test."""
    entries = re.split(r"^- |^#", EQUATIONS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = [entry for entry in entries if re.search(rf"::{system.__name__}[.`]", entry)]
    assert named
    assert all(any(file.startswith("test_") for file, _ in REFERENCE.findall(entry)) for entry in named)


def test_the_configuration_page_is_what_the_code_says() -> None:
    """Made by `dualign keys --markdown > docs/configuration.md`; every key says what it does."""
    from dualign.config import keys as reference

    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference.markdown()
    assert [f"{heading}: {key.name}" for heading, keys in reference.sections() for key in keys if not key.meaning] == []


def test_keys_of_one_section_are_printed_and_a_wrong_name_is_refused() -> None:
    from typer.testing import CliRunner

    from dualign.cli import application
    from dualign.common.errors import UserError

    printed = CliRunner().invoke(application(), ["keys", "dar", "eval"]).stdout
    assert "w_clip" in printed and "20" in printed and "micro_batch_tokens" not in printed and "every" in printed
    with pytest.raises(UserError, match="called darr"):
        CliRunner().invoke(application(), ["keys", "dar", "darr"], catch_exceptions=False)
    assert "weight" in CliRunner().invoke(application(), ["keys", "reward"]).stdout
