"""The report of a grid: report.md, table.csv, curves.csv and figures, from what is finished by now."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dualign.common.durable import write_text
from dualign.common.errors import UserError
from dualign.eval.compare import claims, plots
from dualign.eval.compare.cells import State, selected, state
from dualign.eval.compare.grid import Cell, Grid, cells, selection_cells, unique
from dualign.eval.compare.pareto import fit
from dualign.eval.compare.results import (
    Result,
    along_axes,
    chance,
    distances,
    final,
    finals,
    groups,
    read,
    too_few_prompts,
)
from dualign.eval.compare.table import curves_csv, markdown, rows, table_csv, target_reward
from dualign.run.folder import Run


def write_report(grid: Grid, failed: dict[str, str]) -> str:
    """Writes OUT/report/ and returns the table. Raises UserError where nothing is finished, or (with everything but
    the figures written) where matplotlib is missing."""
    for cell in selection_cells(grid):
        state(cell)  # raises where a folder holds other settings
    states = [(cell, state(cell)) for cell in cells(grid, selected(grid)) if cell.name not in failed]
    results = finished(grid, failed)
    folder = Path(grid.out) / "report"
    folder.mkdir(parents=True, exist_ok=True)
    found = rows(results, grid.reference, grid.at_kl, grid.at_reward)
    table = markdown(found, grid.reference, distances(results))
    write_text(folder / "table.csv", table_csv(found))
    write_text(folder / "curves.csv", curves_csv(results))
    fits = pareto_lines(results)
    parts = [
        f"# {Path(grid.out).name}\n",
        f"Base recipe `{grid.base}`, seeds {', '.join(map(str, grid.seeds))}. Means over seeds ± half the 95 % "
        "t-interval; rewards, KL, length, missing EOS and the share of different completions on held-out prompts after the "
        "last online batch; seconds of the median online batch, which grow with the length of completions and with what "
        "else the machine does. log(π/π_0): its mean over completions sampled as the evaluation samples, which is "
        "KL(π_θ‖π_0) where it samples at temperature 1. α-interpolated: α times that, for systems without α the whole of "
        "it. Systems on a "
        "fixed set buy no labels while training; what the set cost is not counted.\n",
        table,
        *_chance(results),
        *_claims(grid, results),
        *_equal_kl(grid),
        *_codes(results),
        *_target(results, grid),
        *_selection(grid),
        *(["\n## Reward against KL: second-order fits\n\n", *fits] if fits else []),
        *_unfinished(states, failed),
    ]
    write_text(folder / "report.md", "\n".join(parts))
    figures = plots.draw(results, folder)
    write_text(folder / "report.md", "\n".join([*parts, "", *(f"![{f.stem}]({f.name})\n" for f in figures)]))
    return table


def record(grid: Grid, failed: dict[str, str]) -> dict[str, Any]:
    """The report for programs: means over seeds of each system (`half`: half the width of the 95 % interval, `n`: seeds
    that have it), the claims with their answers, and what is not finished. Raises UserError as write_report does."""
    results = finished(grid, failed)
    few = too_few_prompts(results)
    found = [] if few else claims.verdicts(claims.claims_of(grid), results)
    states = {cell.name: state(cell) for cell in cells(grid, selected(grid)) if cell.name not in failed}
    return {
        "folder": grid.out, "base": grid.base, "seeds": grid.seeds, "reference": grid.reference,
        "systems": [asdict(row) for row in rows(results, grid.reference, grid.at_kl, grid.at_reward)],
        "claims": [vars(v) | {"claim": v.claim.model_dump(), "answer": v.answer} for v in found], "too_few_prompts": few,
        "unfinished": {name: s for name, s in states.items() if s != "finished"}, "failed": failed,
    }  # fmt: skip


def finished(grid: Grid, failed: Collection[str] = ()) -> list[Result]:
    """What the grid's finished cells hold. Raises UserError where there are none."""
    compared = [cell for cell in cells(grid, selected(grid)) if cell.name not in failed and state(cell) == "finished"]
    results = [r for cell in compared if (r := read(cell, grid.measure)) is not None]
    if not results:
        raise UserError(f"{grid.out}: no cell is finished, so there is nothing to report")
    return results


def pareto_lines(results: Sequence[Result]) -> list[str]:
    """The fit of each system over the values of each axis, against KL(π_θ‖π_0) and α·KL(π_θ‖π_0), as Markdown
    items."""
    lines = []
    for (system, axis), seeds in along_axes(results).items():
        points = finals(seeds)
        for key, label in zip(("kl", "kl_interpolated"), distances(results), strict=True):
            found = fit([getattr(p, key) for p in points], [p.reward for p in points])
            if found and not (axis == "algo.alpha" and key == "kl_interpolated"):  # α would vary along x
                where = "peak" if found.low < found.peak_kl < found.high else "highest at an end of the range,"
                lines.append(
                    f"- {system}, {axis} ({len(points)} values): reward = {found.a:.4g}·x² + {found.b:.4g}·x + "
                    f"{found.c:.4g} with x = {label} in [{found.low:.3g}, {found.high:.3g}]; {where} "
                    f"{found.peak_reward:.3f} at {found.peak_kl:.3g} nats"
                )
    return lines


def _chance(results: Sequence[Result]) -> list[str]:
    """Whether final rewards differ by more than seeds do: among the values of each axis, and among systems."""
    compared = {f"{system}, {axis}": some for (system, axis), some in along_axes(results).items()}
    compared["systems"] = [r for r in results if r.cell.axis is None]
    lines, tested = [], {}
    for name, some in compared.items():
        settings = [[r.last.reward for r in seeds if r.last] for seeds in groups(some).values()]
        if few := too_few_prompts(some):
            if chance(settings) is not None:
                lines.append(f"- {name}: {few}")
        elif (p := chance(settings)) is not None:
            tested[name] = (p, len(settings))
    for (name, (p, count)), corrected in zip(tested.items(), claims.holm([p for p, _ in tested.values()]), strict=True):
        words = "more than seeds do" if corrected < claims.LEVEL else "no more than seeds do"
        holm = f"; by Holm {corrected:.2g}" if len(tested) > 1 else ""
        lines.append(f"- {name}: the final rewards of {count} differ {words} (p = {p:.2g}{holm})")
    about = "One-way analysis of variance over seeds; of several lines, corrected by Holm.\n"
    return ["\n## Beyond chance?\n", about, *lines, ""] if lines else []


def _claims(grid: Grid, results: Sequence[Result]) -> list[str]:
    """What was claimed, or else each system beside the reference; nothing of too few prompts."""
    if few := too_few_prompts(results):
        return [f"\n## Claims\n\n- {few}\n"] if grid.claims else []
    return claims.lines(claims.verdicts(claims.claims_of(grid), results), bool(grid.claims))


def _equal_kl(grid: Grid) -> list[str]:
    if not grid.at_kl:
        return []
    return [
        "Reward at KL: where a run's curve first came to so many nats, linear between evaluations; the mean over the seeds "
        "that came so far.\n"
    ]


def _codes(results: Sequence[Result]) -> list[str]:
    """Which runs were begun by which state of the package and of what it stands on, where that is not one for all."""
    found: dict[str, list[str]] = {}
    for r in {r.cell.folder: r for r in results}.values():
        about = Run.open(r.cell.folder).about
        found.setdefault(json.dumps([about.get("code"), about.get("versions")]), []).append(r.cell.name)
    if len(found) < 2:
        return []
    least = sorted(found.values(), key=len)[:-1]
    names = ", ".join(name for some in least for name in some)
    return [f"The runs were begun by {len(found)} versions of the code or its packages; unlike most: {names}.\n"]


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
        scores = [final(c.folder, grid.measure) for c in tried]
        texts = ["–" if v is None else f"{v[0]:.3f} ({v[1]:.0%})" for v in scores]
        edge = " (edge of the grid)" if best.get(name) in (s.values[0], s.values[-1]) and len(s.values) > 1 else ""
        lines.append(f"| {name} | {' | '.join(texts)} | {best.get(name, '–')}{edge} |")
    return lines


def _unfinished(states: Sequence[tuple[Cell, State]], failed: dict[str, str]) -> list[str]:
    lines = [f"- {name}: failed: {why}" for name, why in failed.items()]
    of = {cell.folder: s for cell, s in states}
    lines += [f"- {c.name}: {of[c.folder]}" for c in unique(c for c, _ in states) if of[c.folder] != "finished"]
    return ["\n## Not finished\n", *lines] if lines else []
