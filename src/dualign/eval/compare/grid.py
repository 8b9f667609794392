"""A comparison as one YAML file: which runs it is made of. No run is started here."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from dualign import config as configs
from dualign.common.errors import UserError
from dualign.common.settings import Settings
from dualign.common.yaml_text import parse_yaml
from dualign.config import Config
from dualign.config.renamed import RENAMED, with_new_names


class Select(Settings):
    """One setting chosen for each system before the seeds run: the value whose run ends with the highest reward, among
    those whose policy did not collapse. Its seed is none of the compared ones, and `set` should give it other prompts
    to be measured on."""

    key: str = "train.lr"
    values: list[Any] = Field(min_length=1)
    seed: int
    set: dict[str, Any] = Field(default_factory=dict, description="key.sub: value, for these runs only")
    distinct: float = Field(
        0.0, ge=0, le=1, description="share of different completions that a run must end with to be chosen"
    )


class System(Settings):
    """What differs from the base: sections as in a recipe, and axes of its own."""

    recipe: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, list[Any]] = Field(default_factory=dict)


class Claim(Settings):
    """A difference that is expected, written down before the runs: of a number of each run of one system, its mean over
    seeds is above that of another system; or, without `than`, above 0. A setting of a system that has axes is named as
    in the report: `dar, algo.alpha = 0.0`."""

    says: str = Field(description="the claim in words")
    more: str = Field(description="the system that is said to have more")
    than: str | None = Field(None, description="the one that is said to have less; none: 0")
    reward: str | None = Field(None, description="which reward's held-out mean; default: what the grid measures")
    of: Literal["end", "change", "fall", "at_kl", "labels"] = Field(
        "end",
        description="end: after the run; change: since π_0; fall: the deepest fall below what was reached before; at_kl: "
        "where the run first came to `kl` nats; labels: those bought until it first reached `to`",
    )
    kl: float | None = Field(None, gt=0, description="nats, for at_kl")
    to: float | None = Field(None, description="the reward, for labels")
    after: float = Field(1.0, gt=0, le=1, description="of `more`: after this share of its batches")
    less: bool = Field(False, description="it is below, not above")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        for key, of in {"kl": "at_kl", "to": "labels"}.items():
            if (self.of == of) != (getattr(self, key) is not None):
                raise ValueError(f"{key}: goes with of: {of}, and with nothing else")
        return self


class Grid(Settings):
    PATHS: ClassVar[tuple[str, ...]] = ("base", "out")
    base: str = Field(description="the recipe that all cells start from: a file, or a shipped recipe's name")
    out: str = Field(description="the folder of the runs and the report")
    seeds: list[int] = Field(min_length=1)
    set: dict[str, Any] = Field(default_factory=dict, description="key.sub: value, for every cell")
    systems: dict[str, dict[str, Any]] = Field(default_factory=dict, description="name: sections that differ, and axes")
    axes: dict[str, list[Any]] = Field(
        default_factory=dict,
        description="key.sub: values, one key at a time, the others as in the base; a value may be a mapping that "
        "sets further keys beside its own",
    )
    select: Select | None = None
    reference: str | None = Field(None, description="the system to whose final reward labels are counted")
    measure: str | None = Field(
        None, description="the reward by whose held-out mean systems are compared and selected; default: their sum"
    )
    claims: list[Claim] = Field(
        default_factory=list, description="tested by the report; default: a row for each system"
    )
    at_kl: list[float] = Field(default_factory=list, description="nats of KL to π_0 at which systems are compared, too")
    at_reward: list[float] = Field(
        default_factory=list, description="rewards until which each run's labels are counted, too"
    )
    keep_weights: bool = Field(True, description="of the finished cells; those of the selection are always dropped")
    launch: str = Field("", description="what starts a run, where not this Python: `accelerate launch -m`")

    def system(self, name: str) -> System:
        tree = dict(self.systems[name])
        axes = tree.pop("axes", {})
        return System(recipe=tree, axes={**self.axes, **axes})


@dataclass(frozen=True)
class Cell:
    """One run. `axis`, `value`: the setting that an ablation moves, if it is one."""

    system: str
    axis: str | None
    value: Any
    seed: int
    folder: Path
    config: Config

    @property
    def setting(self) -> str:
        """Its name without the seed, as claims and the report's table have it."""
        return setting_name(self.system, self.axis, self.value)

    @property
    def name(self) -> str:
        moved = f" {self.axis}={self.value}" if self.axis else ""
        return f"{self.system}{moved} seed {self.seed}"


def setting_name(system: str, axis: str | None, value: Any) -> str:
    return f"{system}, {axis} = {value}" if axis else system


def load(path: str | Path, base: str | None = None, out: str | None = None) -> Grid:
    """The grid of a file, or of a shipped one by its name under compare/. `base` and `out` replace the file's own.
    Raises UserError naming the file and the key."""
    file = _find(str(path))
    tree = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a grid is a mapping with base, seeds, systems or axes")
    name = Path(path).with_suffix("").name if Path(path).is_file() else str(path).removeprefix("compare/")
    tree = {"out": f"runs/compare/{name}", **tree}
    if base is not None:  # its runs are other runs
        tree |= {"base": base, "out": f"{tree['out']}-{Path(base).stem if base.endswith('.yaml') else Path(base).name}"}
    if out is not None:
        tree["out"] = out
    tree["systems"] = {k: v or {} for k, v in (tree.get("systems") or {"base": {}}).items()}
    try:
        grid = Grid.model_validate(tree)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
        raise UserError("\n".join(f"{file}: {line}" for line in lines)) from None
    _check(grid, file)
    return grid


def _find(name: str) -> Path:
    shipped = configs.recipes()
    path = Path(name) if Path(name).is_file() else shipped.get(f"compare/{name.removeprefix('compare/')}")
    if path is None:
        have = ", ".join(n.removeprefix("compare/") for n in shipped if n.startswith("compare/"))
        raise UserError(f"{name}: no such file, and none of the grids that ship: {have}")
    return path


def _check(grid: Grid, file: Path) -> None:
    if grid.reference is not None and grid.reference not in grid.systems:
        raise UserError(f"{file}: reference: no system {grid.reference!r}; there are {', '.join(grid.systems)}")
    points = [(name, axis, value) for name in grid.systems for axis, value, _ in _points(grid.system(name))]
    known = [setting_name(*point) for point in points]
    for i, claim in enumerate(grid.claims):
        for key, name in {"more": claim.more, "than": claim.than}.items():
            if name is not None and name not in known:
                raise UserError(f"{file}: claims.{i}.{key}: no {name!r}; there are: {'; '.join(known)}")
    if len(set(grid.seeds)) < len(grid.seeds):
        raise UserError(f"{file}: seeds: {grid.seeds} names one twice; it would count as two runs")
    if grid.select and grid.select.seed in grid.seeds:
        raise UserError(f"{file}: select.seed: {grid.select.seed} is also compared; selection needs a seed of its own")
    for name in grid.systems:
        if "/" in name or name in ("select", "report"):
            raise UserError(f"{file}: systems.{name}: names a folder; choose another name")
        recipe = with_new_names(grid.system(name).recipe)
        for key, value in grid.set.items():
            own = _own(recipe, RENAMED.get(key, key))
            if own not in (None, value):
                raise UserError(
                    f"{file}: systems.{name}: {key} is {own} here and {value} in `set`, which holds for every cell; "
                    "give it to each system, or to none"
                )


def _own(recipe: dict[str, Any], key: str) -> Any:
    """What a system says of `key.sub`; None if nothing."""
    at: Any = recipe
    for part in key.split("."):
        at = at.get(part) if isinstance(at, dict) else None
    return at


def selection_cells(grid: Grid) -> list[Cell]:
    """The runs that choose `select.key`, one per system and value."""
    if grid.select is None:
        return []
    s, cells = grid.select, []
    for name in grid.systems:
        for value in s.values:
            settings = {**s.set, s.key: value, "run.seed": s.seed}
            folder = Path(grid.out) / "select" / name / f"{s.key}={value}"
            cells.append(Cell(name, s.key, value, s.seed, folder, _configure(grid, name, settings, folder)))
    return cells


def cells(grid: Grid, chosen: dict[str, Any]) -> list[Cell]:
    """The runs that are compared, seed by seed, so that what was cut off is still a comparison. `chosen`: each
    system's selected value; where the grid selects and a system has none, it has no cells. Cells whose settings turn
    out the same (an axis passing through the base's own value) share one folder, and so one run."""
    found: list[Cell] = []
    folders: dict[tuple[str, str], Path] = {}
    owners: dict[Path, Config] = {}
    for seed in grid.seeds:
        for name in grid.systems:
            if grid.select and name not in chosen:
                continue
            selected = {grid.select.key: chosen[name]} if grid.select else {}
            for axis, value, settings in _points(grid.system(name)):
                folder = Path(grid.out) / name / (f"{axis}={value}" if axis else "") / f"seed{seed}"
                config = _configure(grid, name, {**selected, **settings, "run.seed": seed}, folder)
                folder = folders.setdefault((name, config.model_dump_json(exclude={"run": {"dir"}})), folder)
                settled = _at(config, folder)
                if owners.setdefault(folder, settled) != settled:
                    raise UserError(f"axes.{axis}: two settings are called {value}; give one of them another value")
                found.append(Cell(name, axis, value, seed, folder, settled))
    return found


def unique(found: Iterable[Cell]) -> list[Cell]:
    """One cell of each folder, the first."""
    first: dict[Path, Cell] = {}
    for cell in found:
        first.setdefault(cell.folder, cell)
    return list(first.values())


def _points(system: System) -> list[tuple[str | None, Any, dict[str, Any]]]:
    """(axis, value, all that it sets) of each point; a system without axes is a single one."""
    points: list[tuple[str | None, Any, dict[str, Any]]] = []
    for axis, values in system.axes.items():
        for value in values:
            settings = value if isinstance(value, dict) else {axis: value}
            if axis not in settings:
                raise UserError(f"axes.{axis}: the mapping {value} does not set {axis} itself")
            points.append((axis, settings[axis], settings))
    return points or [(None, None, {})]


def _configure(grid: Grid, name: str, settings: dict[str, Any], folder: Path) -> Config:
    tree, path = configs.read(grid.base)
    given = {**grid.set, **settings, "run.dir": str(folder)}
    overrides = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    tree = configs.overridden(configs.merge(tree, grid.system(name).recipe), overrides)
    return configs.build(tree, f"{path} as system {name}")


def _at(config: Config, folder: Path) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
