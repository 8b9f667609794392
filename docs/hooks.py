"""For MkDocs. Pages link to files of the repository outside docs/ (examples, results, CONTRIBUTING.md), as any editor and
any forge follows them. Here these files become part of the site, and the links lead to them there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\(|^\[[^\]]+\]:\s+)([^)\s#:]+)(?=[)\s#]|$)", re.MULTILINE)
CODE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
SHOWN = {".py": "python", ".yaml": "yaml", ".jsonl": "json", ".ipynb": "json"}  # as a page with the file's text
OTHER = "More"  # where pages are listed that mkdocs.yml does not name


def site_uri(path: Path) -> str:
    """Where a file of the repository is on the site."""
    if path == ROOT / "README.md":
        return "index.md"
    place = path.relative_to(DOCS if path.is_relative_to(DOCS) else ROOT).as_posix()
    return f"{place}.md" if path.suffix in SHOWN else place


def target(page: Path, link: str) -> Path | None:
    """The file that a page of the repository links to; of a folder, its README. None: nothing that is here."""
    path = Path(os.path.normpath(page.parent / link))
    path = path / "README.md" if path.is_dir() else path
    return path if path.is_file() and path.is_relative_to(ROOT) else None


def on_config(config: Any) -> Any:
    """A page that the navigation forgot is listed all the same."""
    listed = set(re.findall(r"[\w/-]+\.md", str(config.nav)))
    pages = [path.relative_to(DOCS).as_posix() for path in sorted(DOCS.glob("*.md"))]
    if forgotten := [page for page in pages if page not in listed]:
        config.nav.append({OTHER: forgotten})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds what is linked to, and what that links to."""
    left, seen = sorted(DOCS.rglob("*.md")), set(DOCS.rglob("*"))
    while left:
        page = left.pop()
        for _, link in LINK.findall(CODE.sub("", page.read_text(encoding="utf-8"))):
            path = target(page, link)
            if path is None or path in seen or site_uri(path) == "index.md":
                continue
            seen.add(path)
            files.append(_included(path, config))
            left += [path] if path.suffix == ".md" else []
    return files


def _included(path: Path, config: Any) -> File:
    uri = site_uri(path)
    if path.suffix not in SHOWN:
        return File.generated(config, uri, abs_src_path=str(path))
    text = path.read_text(encoding="utf-8")
    return File.generated(config, uri, content=f"# {path.name}\n\n````{SHOWN[path.suffix]}\n{text}````\n")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links lead to where files are on the site."""
    here = page.file.src_uri
    own = DOCS / here
    source = own if own.is_file() else ROOT / here

    def moved(match: re.Match[str]) -> str:
        path = target(source, match[2])
        if path is None or (path.is_relative_to(DOCS) and source == own):
            return match[0]
        return match[1] + os.path.relpath(site_uri(path), Path(here).parent)

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else LINK.sub(moved, part) for part in parts)
