"""Where a recipe's file is: as it is named, beside another, or among those that ship."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path

from dualign.common.errors import UserError
from dualign.common.paths import at_home


def recipes() -> dict[str, Path]:
    """The recipes that ship with the package, by name (`quickstart`, `small/grpo`, ...)."""
    root = Path(str(resources.files("dualign.config") / "recipes"))
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find(recipe: str | Path, folder: Path = Path()) -> Path:
    """A file (as given, or beside the recipe that names it), or a shipped recipe by its name."""
    recipe = at_home(str(recipe))
    for path in (Path(recipe), folder / recipe):
        if path.is_file():
            return path
    shipped = recipes()
    if str(recipe) not in shipped:
        near = difflib.get_close_matches(str(recipe), shipped, 1, 0.5)
        hint = f"; did you mean {near[0]}?" if near else "; `dualign recipes` lists those that ship"
        raise UserError(f"{recipe}: no such file or recipe{hint}")
    return shipped[str(recipe)]
