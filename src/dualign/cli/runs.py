"""runs, doctor, init: what there is, whether all is well, how to begin."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualign.cli.printed import AsJson, document

if TYPE_CHECKING:
    from dualign.run.shelf import Plan, Shelved


def register(app: typer.Typer) -> None:
    app.command()(runs)
    app.command()(doctor)
    app.command()(init)


def runs(
    places: Annotated[list[Path] | None, typer.Argument(help="runs, or folders of runs; default: runs")] = None,
    clean: Annotated[
        str | None,
        typer.Option(help="what may go of them: state (training state of finished runs), checkpoints, all"),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="with --clean: do not ask")] = False,
    as_json: AsJson = False,
) -> None:
    """List runs: how far, the gain, what each takes on disk. --clean shows what would go, and asks."""
    from dualign.common.errors import UserError
    from dualign.run import shelf

    folders = shelf.found(places or [Path("runs")])
    if clean is not None:
        if clean not in shelf.WHATS:
            raise UserError(f"--clean {clean}: one of {', '.join(f'{w} ({told})' for w, told in shelf.WHATS.items())}")
        _clean(shelf.plans(folders, clean), yes)  # type: ignore[arg-type]
        return
    listed = [shelf.shelved(folder) for folder in folders]
    if as_json:
        document([each.record() for each in listed])
        return
    _list(listed)
    if listed:
        total, free = sum(each.bytes for each in listed), shelf.free_disk(folders[0])
        print(f"{len(listed)} runs, {_size(total)}; {_size(free)} free")


def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="also look at what this recipe needs: model, rewards, judges")
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key.sub=value")] = None,
    as_json: AsJson = False,
) -> None:
    """What is installed, which devices, how much room, what is in reach, and what to do about it. Exit code 1: there is
    something to fix."""
    from dualign.cli.doctor import examined
    from dualign.cli.train import _quiet

    _quiet()
    if examined(recipe, overrides or (), as_json):
        raise typer.Exit(1)


def init(
    out: Annotated[Path, typer.Option(help="the recipe's file")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="a folder, a hub's name, a run, smollm2-135m-instruct")] = None,
    prompts: Annotated[str | None, typer.Option(help="what to train on")] = None,
    held_out: Annotated[str | None, typer.Option(help="what measures the gain; '': nothing")] = None,
    reward: Annotated[str | None, typer.Option(help="judge, function, classifier or head")] = None,
    at: Annotated[str | None, typer.Option(help="where that is: 'URL MODEL', FILE.py:NAME, a model, a head")] = None,
    system: Annotated[str, typer.Option(help="dar, grpo, rloo, ...")] = "dar",
) -> None:
    """Write a recipe from five answers, and try it without training (--dry-run). Options answer without a terminal."""
    from dualign import config as configs
    from dualign.cli import init as asking
    from dualign.cli.train import _quiet
    from dualign.training.plan import print_plan

    _quiet()
    given = {"model": model, "prompts": prompts, "held_out": held_out, "reward": reward, "at": at}

    def ask(question: str, default: str | None) -> str:
        return str(typer.prompt(question, default=default, show_default=bool(default)))

    asking.check_new(out)
    asking.write(out, asking.recipe(asking.answers(given, ask if at_terminal() else None), system))
    print(f"wrote {out}; what it would do:\n")
    print_plan(configs.load(out))
    print(f"\nnext: dualign train {out}")


def at_terminal() -> bool:
    return sys.stdin.isatty()


def _list(listed: Sequence[Shelved]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dualign.common.errors import clean
    from dualign.common.intervals import plus_minus

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, side in {"run": "left", "state": "left", "system": "left", "batches": "right", "gain": "right",
                       "disk": "right", "begun": "left"}.items():  # fmt: skip
        table.add_column(name, justify=side)  # type: ignore[arg-type]
    for each in listed:
        gain = "" if each.gain is None else plus_minus(each.gain, each.gain_ci, None)
        cells = (str(each.folder), each.state, each.system, f"{each.done}/{each.batches}", gain, _size(each.bytes),
                 (each.begun or "")[:16].replace("T", " "))  # fmt: skip
        table.add_row(*(Text(clean(cell)) for cell in cells))
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else 160).print(table)


def _clean(plans: Sequence[Plan], yes: bool) -> None:
    """A preview, a question, and then what it said."""
    from dualign.common.errors import UserError
    from dualign.common.errors import clean as inert
    from dualign.run import shelf

    wanted = [each for each in plans if each.paths]
    for each in plans:
        if each.why:
            print(inert(f"stays: {each.folder}: {each.why}"))
        elif each.paths:
            print(inert(f"goes:  {each.folder}: {len(each.paths)} files and folders, {_size(each.bytes)}"))
        for path in each.foreign:
            print(inert(f"stays: {path}: not the run's"))
    if not wanted:
        print("nothing to clean")
        return
    total = _size(sum(each.bytes for each in wanted))
    if not yes and not at_terminal():
        raise UserError(f"{total} of {len(wanted)} runs would go; there is no terminal to ask at: --yes")
    if not yes and not typer.confirm(f"Delete {total} of {len(wanted)} runs?"):
        print("nothing was deleted")
        return
    for each in wanted:
        shelf.clean(each)
        print(inert(f"cleaned {each.folder}"))


def _size(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
