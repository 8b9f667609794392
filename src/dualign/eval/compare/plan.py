"""`--dry-run` of a grid: its cells, the labels they buy, and how long they may take, from those that are finished."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dualign.config import Config
from dualign.eval.compare.cells import selected, state
from dualign.eval.compare.grid import Cell, Grid, cells, selection_cells, unique
from dualign.eval.compare.results import read


def plan_lines(grid: Grid, jobs: int = 1) -> list[str]:
    """What a run of the grid would do, `jobs` at a time. Until the selection is finished, its first value
    stands for the selected one."""
    first = selection_cells(grid)
    done = selected(grid)
    assumed = {name: done.get(name, grid.select.values[0]) for name in grid.systems} if grid.select else {}
    compared = cells(grid, assumed)
    # with a value that is only assumed, a folder of another value is not a fault
    whole = not grid.select or set(done) == set(grid.systems)
    every = unique([*first, *compared])
    states = {cell.folder: state(cell) if whole or cell in first else "to do" for cell in every}
    lines = [f"{len(every)} runs in {grid.out}: {len(first)} to select, {len(every) - len(first)} to compare"]
    for cell in every:
        t = cell.config.train
        labels, evaluated = cell.config.labels
        priced = f", at most about {cost:.2f} dollars" if (cost := dollars(cell.config)) else ""
        lines.append(
            f"  {cell.name}: {t.online_batches} × {t.online_batch}, lr {t.lr:g}; "
            f"{labels} labels to train, {evaluated} to evaluate{priced}; {states[cell.folder]}"
        )
    todo = [cell for cell in every if states[cell.folder] != "finished"]
    totals = np.array([cell.config.labels for cell in todo]).reshape(-1, 2).sum(0)
    cost = sum(dollars(cell.config) for cell in todo)
    lines.append(
        f"still to do: {len(todo)} runs, {totals[0]} labels to train and {totals[1]} to evaluate at most"
        + (f", at most about {cost:.2f} dollars" if cost else "")
    )
    return [*lines, _time(todo, [cell for cell in every if states[cell.folder] == "finished"], jobs)]


def dollars(config: Config) -> float:
    """An upper estimate of what a run's labels cost."""
    return sum(reward.of_groups(config.group).dollars(sum(config.labels)) for reward in config.reward)


def _time(todo: Sequence[Cell], finished: Sequence[Cell], jobs: int) -> str:
    """Seconds per completion of the same system's finished runs, or of all where it has none."""
    spent: dict[str, list[float]] = {}
    for cell in finished:
        result = read(cell)
        if result and result.last:
            size = cell.config.train.online_batch * max(1, cell.config.train.online_batches)
            spent.setdefault(cell.system, []).append(result.last.seconds / size)
    if not spent:
        return "time: unknown until the first run is finished"
    anyone = float(np.mean([v for values in spent.values() for v in values]))
    total = sum(
        float(np.mean(spent.get(c.system, [anyone]))) * c.config.train.online_batch * c.config.train.online_batches
        for c in todo
    )
    how = "one after the other" if jobs == 1 else f"{jobs} at a time, if they ran so before"
    return (
        f"time: about {total / jobs / 3600:.1f} hours of training, {how}, by the {len(finished)} finished; "
        "evaluations come on top"
    )
