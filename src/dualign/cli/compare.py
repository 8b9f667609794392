"""compare, sweep, sft, pairs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from dualign.cli.printed import AsJson, document, note

Base = Annotated[str | None, typer.Option(help="another base recipe than the grid's")]
Out = Annotated[Path | None, typer.Option(help="another folder than the grid's")]
ReportOnly = Annotated[bool, typer.Option("--report-only", help="run nothing; report what is finished")]
Jobs = Annotated[int, typer.Option(min=1, help="runs side by side; the cores are shared out, GPUs and memory are not")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="show the runs, their labels and their time, and stop")]

Power = Annotated[
    float | None,
    typer.Option(help="run nothing; by the finished runs, what it takes to tell a difference of this size"),
]

REPORT_ALONE = "prints the report; --dry-run and --power are for people: leave one of them out"


def register(app: typer.Typer) -> None:
    app.command()(compare)
    app.command()(sweep)
    app.command()(sft)
    app.command()(pairs)


def compare(
    grid: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped grid")],
    base: Base = None,
    out: Out = None,
    jobs: Jobs = 1,
    report_only: ReportOnly = False,
    dry_run: DryRun = False,
    power: Power = None,
    as_json: AsJson = False,
) -> None:
    """Run systems side by side over seeds, and report: table, curves, figures. Called again, it resumes."""
    if power is None:
        _run(grid, base, out, jobs, report_only, dry_run, as_json, needs="systems")
        return
    from dualign.common.errors import UserError
    from dualign.eval.compare.grid import load
    from dualign.eval.compare.power import power_lines
    from dualign.eval.compare.report import finished

    if as_json:
        raise UserError(f"--json {REPORT_ALONE}")
    loaded = load(grid, base, str(out) if out else None)
    print("\n".join(power_lines(loaded, finished(loaded), power)))


def sweep(
    grid: Annotated[str, typer.Argument(help="a YAML file with axes, or the name of a shipped one")],
    base: Base = None,
    out: Out = None,
    jobs: Jobs = 1,
    report_only: ReportOnly = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Run a grid over settings (its axes), one at a time, and report the ablations and the Pareto fit."""
    _run(grid, base, out, jobs, report_only, dry_run, as_json, needs="axes")


def _run(
    path: str,
    base: str | None,
    out: Path | None,
    jobs: int,
    report_only: bool,
    dry_run: bool,
    as_json: bool,
    needs: str,
) -> None:
    from dualign.common.errors import StopRun, UserError
    from dualign.eval.compare.grid import load

    grid = load(path, base, str(out) if out else None)
    axes = any(grid.system(name).axes for name in grid.systems)
    if needs == "axes" and not axes:
        raise UserError(f"{path}: has no axes to sweep; `dualign compare {path}` compares its systems")
    if dry_run and as_json:
        raise UserError(f"--json {REPORT_ALONE}")
    if dry_run:
        from dualign.eval.compare.plan import plan_lines

        print("\n".join(plan_lines(grid, jobs)))
        return
    from dualign.eval.compare.cells import run_grid, subprocesses
    from dualign.eval.compare.report import record, write_report

    say = note if as_json else partial(print, flush=True)
    execute = subprocesses(grid.launch, jobs)
    failed = {} if report_only else run_grid(grid, execute, say, jobs)
    try:
        table = write_report(grid, failed)
        if as_json:
            document(record(grid, failed))
        else:
            print(table)
        say(f"report: {grid.out}/report/report.md")
    finally:
        for name, why in failed.items():
            say(f"failed: {name}: {why}")
    if failed:
        raise StopRun(f"{len(failed)} failed; the same command tries them again and leaves the finished ones alone")


def sft(
    recipe: Annotated[str | None, typer.Argument(help="a recipe with algo sft; or give --data and --model")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    data: Annotated[str | None, typer.Option(help="demonstrations, or preferences (their chosen responses)")] = None,
    model: Annotated[str | None, typer.Option(help="the model to start from")] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; the model is OUT/model")] = None,
    epochs: Annotated[float | None, typer.Option(help="passes over the data; default: the recipe's, or 1")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
) -> None:
    """Make π_0: supervised fine-tuning on demonstrations or chosen responses."""
    from dualign.cli.sft import sft_config

    # `dualign sft key=value --data ...`: without a recipe, the first argument is an override
    given = list(overrides or ())
    if recipe and "=" in recipe and not Path(recipe).exists():
        given, recipe = [recipe, *given], None
    config = sft_config(recipe, given, data, model, str(out) if out else None, epochs)
    if dry_run:
        from dualign.training.plan import print_plan

        print_plan(config)
        return
    from dualign.cli.sft import make
    from dualign.cli.train import _leave_group, _quiet

    _quiet()
    print(f"π_0 is {(model_folder := make(config))}: the next run takes it as model.name={model_folder}")
    _leave_group()


def pairs(
    recipe: Annotated[str, typer.Argument(help="whose model, prompts, sampling and rewards are used")],
    out: Annotated[Path, typer.Option(help="where the pairs go (.jsonl)")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="so many prompts, drawn by the run's seed")] = None,
) -> None:
    """Make a preference set for the offline systems: of π_0's K answers to a prompt, the best and the worst."""
    from dualign import config as configs
    from dualign.cli.train import _quiet

    config = configs.load(recipe, overrides or ())
    _quiet()
    from dualign.training.pairs import make_pairs

    print(make_pairs(config, out, limit))
