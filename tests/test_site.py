"""The documentation's site builds without a warning, holds every page, and needs nothing from elsewhere."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FETCHED = re.compile(
    r"""<(?:script|img|iframe)[^>]+src="?(https?:[^">]+)|<link[^>]+stylesheet[^>]+href="?(https?:[^">]+)"""
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    commands = pytest.importorskip("mkdocs.commands.build", reason="needs the extra `docs`")
    from mkdocs.config import load_config

    folder = tmp_path_factory.mktemp("site")
    warnings = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    try:
        commands.build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=False))
    finally:
        logging.getLogger("mkdocs").removeHandler(handler)
    assert warnings == []  # a link, an anchor, a page of the navigation or a docstring that leads nowhere
    return folder


def test_every_page_is_there(site):
    for page in (ROOT / "docs").rglob("*.md"):
        place = page.relative_to(ROOT / "docs").with_suffix(".html")
        assert (site / (place.with_name("index.html") if place.stem == "README" else place)).is_file()


def test_the_navigation_names_no_page_twice():
    named = re.findall(r"[\w/-]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1])
    assert len(named) > 30 and sorted(named) == sorted(set(named))


def test_what_pages_link_to_outside_docs_is_there(site):
    text = (site / "systems.html").read_text(encoding="utf-8")
    assert 'href="examples/system.py.html"' in text
    assert "LinearlyWeighted" in (site / "examples" / "system.py.html").read_text(encoding="utf-8")
    assert "online_batches" in (site / "configuration.html").read_text(encoding="utf-8")
    assert "Did it get better" in (site / "reading-a-run.html").read_text(encoding="utf-8")
    assert "resume=True" in (site / "api.html").read_text(encoding="utf-8")  # a docstring's words


def test_no_page_fetches_anything_from_elsewhere(site):
    for page in site.rglob("*.html"):
        assert FETCHED.findall(page.read_text(encoding="utf-8")) == [], page
