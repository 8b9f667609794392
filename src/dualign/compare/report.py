"""The report of a grid: report.md, table.csv, curves.csv, pareto.csv and figures, from what is finished by now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dualign.compare import plots
from dualign.compare.cells import selected, state
from dualign.compare.grid import Cell, Grid, cells, selection_cells, unique
from dualign.compare.pareto import fit
from dualign.compare.results import Result, final, finals, read
from dualign.compare.table import curves_csv, markdown, rows, table_csv, target_reward
from dualign.errors import UserError
from dualign.runs import write_text


def write_report(grid: Grid, failed: dict[str, str]) -> str:
    """Writes OUT/report/ and returns the table. Raises UserError where nothing is finished, or (with everything but
    the figures written) where matplotlib is missing."""
    compared = cells(grid, selected(grid))
    results = [r for cell in compared if (r := read(cell)) is not None]
    if not results:
        raise UserError(f"{grid.out}: no cell is finished, so there is nothing to report")
    folder = Path(grid.out) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    table = markdown(rows(results, grid.reference), grid.reference)
    write_text(folder / "table.csv", table_csv(rows(results, grid.reference)))
    write_text(folder / "curves.csv", curves_csv(results))
    fits = pareto_lines(results)
    parts = [
        f"# {Path(grid.out).name}\n",
        f"Base recipe `{grid.base}`, seeds {', '.join(map(str, grid.seeds))}. Means over seeds ± half the 95 % "
        "t-interval; rewards, KL, length and missing EOS on held-out prompts after the last online batch; seconds of "
        "the median online batch. α-interpolated KL: α·KL(π_θ‖π_0), for systems without α the whole of it.\n",
        table,
        *_target(results, grid),
        *_selection(grid),
        *(["\n## Reward against KL: second-order fits\n\n", *fits] if fits else []),
        *_unfinished(compared, failed),
    ]
    write_text(folder / "report.md", "\n".join(parts))
    figures = plots.draw(results, folder)
    write_text(folder / "report.md", "\n".join([*parts, "", *(f"![{f.stem}]({f.name})\n" for f in figures)]))
    return table


def pareto_lines(results: Sequence[Result]) -> list[str]:
    """The fit of each system over its settings, against KL(π_θ‖π_0) and α·KL(π_θ‖π_0), as Markdown items."""
    lines = []
    for name in dict.fromkeys(r.cell.system for r in results):
        points = finals([r for r in results if r.cell.system == name])
        for key, label in (("kl", "KL(π_θ‖π_0)"), ("kl_interpolated", "α-interpolated KL")):
            found = fit([getattr(p, key) for p in points], [p.reward for p in points])
            if found:
                lines.append(
                    f"- {name}: reward = {found.a:.4g}·x² + {found.b:.4g}·x + {found.c:.4g} with x = {label} in "
                    f"[{found.low:.3g}, {found.high:.3g}]; peak {found.peak_reward:.3f} at {found.peak_kl:.3g} nats"
                )
    return lines


def _target(results: Sequence[Result], grid: Grid) -> list[str]:
    target = target_reward(results, grid.reference)
    if target is None:
        return []
    return [
        f"Labels are counted until the mean curve over seeds first reaches {grid.reference}'s mean final reward, "
        f"{target:.3f}, linearly between evaluations.\n"
    ]


def _selection(grid: Grid) -> list[str]:
    """What was selected, from which scores, and on what."""
    if grid.select is None:
        return []
    s, best = grid.select, selected(grid)
    lines = [
        f"\n## Selection of {s.key}\n",
        f"For each system the value whose run on seed {s.seed}"
        f"{', with ' + ', '.join(f'{k}={v}' for k, v in s.set.items()) if s.set else ''} ended with the highest reward"
        + (f" among those with at least {s.distinct:.0%} different completions" if s.distinct else "")
        + "; that seed is not among the compared ones. In brackets: different completions.\n",
        "| system | " + " | ".join(map(str, s.values)) + " | selected |",
        "| --- " * (len(s.values) + 2) + "|",
    ]
    by_system: dict[str, list[Cell]] = {}
    for cell in selection_cells(grid):
        by_system.setdefault(cell.system, []).append(cell)
    for name, tried in by_system.items():
        scores = [final(c.folder) for c in tried]
        texts = ["–" if v is None else f"{v[0]:.3f} ({v[1]:.0%})" for v in scores]
        edge = " (edge of the grid)" if best.get(name) in (s.values[0], s.values[-1]) and len(s.values) > 1 else ""
        lines.append(f"| {name} | {' | '.join(texts)} | {best.get(name, '–')}{edge} |")
    return lines


def _unfinished(compared: Sequence[Cell], failed: dict[str, str]) -> list[str]:
    lines = [f"- {name}: failed: {why}" for name, why in failed.items()]
    lines += [f"- {c.name}: {s}" for c in unique(compared) if c.name not in failed and (s := state(c)) != "finished"]
    return ["\n## Not finished\n", *lines] if lines else []
