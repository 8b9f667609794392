"""What is uploaded is whole, and what `make` installs is pinned."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dualign

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_version_is_one():
    assert PROJECT["version"] == dualign.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == dualign.__version__
    assert (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("## ")[1].startswith(dualign.__version__)


def test_the_lock_has_every_package_that_make_asks_for_within_its_bound():
    """`make lock` renews it."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {}
    for line in lines:
        if not line.startswith("#"):
            name, _, version = line.partition("==")
            pinned[re.sub(r"[-_.]+", "-", name).lower()] = version
    extras = PROJECT["optional-dependencies"]
    asked = [
        *PROJECT["dependencies"],
        *(line for name in ("dev", "lora", "qlora", "plots", "serve", "view", "docs") for line in extras[name]),
    ]
    wrong = []
    for line in map(Requirement, asked):
        name = re.sub(r"[-_.]+", "-", line.name).lower()
        if name != "dualign" and not (name in pinned and line.specifier.contains(pinned[name])):
            wrong.append(f"{line} is {pinned.get(name, 'not pinned')}")
    assert wrong == []
    assert [
        line for line in asked if not re.search(r"[><=~]=", line) and "dualign[" not in line and "types-" not in line
    ] == []


@pytest.mark.slow
def test_the_package_can_be_released():
    said = subprocess.run(
        ["bash", str(ROOT / ".ci" / "release")], env=_environment(), capture_output=True, text=True, check=False
    )
    assert said.returncode == 0, said.stdout[-3000:] + said.stderr[-3000:]
    assert "left to a person" in said.stdout


def _environment():
    import os

    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PYTHON": sys.executable}
