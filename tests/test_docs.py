"""The documents name only what exists, and can be read in any editor."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dualign.algos import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "dualign"
EQUATIONS = ROOT / "docs" / "equations.md"
REFERENCE = re.compile(r"`([\w/]+\.py)::([\w.]+)`")
MODULE = re.compile(r"`(\w+(?:/\w+)*\.py)`")  # `training/engine.py`, seen from src/dualign
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]:\s+(\S+)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```|`[^`\n]+`", re.MULTILINE | re.DOTALL)

README_LINES = 120
WIDTH = 120

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
WRITTEN = [p for p in PAGES if p.parent.name != "results"]  # results are as they were made


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


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
        path = ROOT / "tests" / "algos" / file if file.startswith("test_") else SOURCE / "algos" / file
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


def test_the_readme_is_read_in_two_minutes() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


@pytest.mark.parametrize("page", WRITTEN, ids=page_name)
def test_lines_fit(page: Path) -> None:
    lines = page.read_text(encoding="utf-8").splitlines()
    assert [(number, len(line)) for number, line in enumerate(lines, 1) if len(line) > WIDTH] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = CODE.sub("", page.read_text(encoding="utf-8"))
    links = {(inline or reference).partition("#")[0] for inline, reference in LINK.findall(text)}
    relative = {link for link in links if link and "://" not in link and not link.startswith("mailto:")}
    assert sorted(link for link in relative if not (page.parent / link).exists()) == []


@pytest.mark.parametrize("page", ["architecture.md", "speed.md"])
def test_modules_named_exist(page: str) -> None:
    """`training/engine.py` is that of src/dualign."""
    named = MODULE.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    assert named
    assert sorted({path for path in named if not (SOURCE / path).is_file()}) == []


def test_folders_import_what_the_architecture_says() -> None:
    """The page lists folders and modules in the order of their imports: each knows only itself and what is above it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    order = [name.removesuffix(".py").strip("/") for name in re.findall(r"\*\*(\w+(?:/|\.py))\*\*", text)]
    here = {p.stem for p in SOURCE.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert set(order) == {name for name in here if not name.startswith("__")}
    wrong = []
    for path in sorted(SOURCE.rglob("*.py")):
        place = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if place in order:
            known = order[: order.index(place) + 1]
            wrong += [f"{path.relative_to(SOURCE)}: {name}" for name in _imported(path) - {*known, ""}]
    assert wrong == []


def _imported(path: Path) -> set[str]:
    """The folders and modules of dualign that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("dualign.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "dualign":
            found |= {alias.name for alias in node.names if not alias.name.startswith("__")}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dualign."):
            found.add(str(node.module).split(".")[1])
    return found


def test_the_keys_a_resume_may_change_are_listed() -> None:
    from dualign.annotate.endpoints import Endpoint
    from dualign.rollout.settings import ENGINES
    from dualign.training.resume import ALLOWED

    text = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    sampling = {f"rollout.options.{name}" for settings in ENGINES.values() for name in settings.ASKING}
    assert [key for key in [*ALLOWED, *sorted(sampling), *Endpoint.ASKING] if f"`{key}`" not in text] == []


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
