"""The command line: one short function per command, grouped by file. Heavy imports happen inside the commands."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from dualign.common.paths import at_home

# seconds that a process waits for the others: what is in flight is on its way to some; an error may be its own alone
STOPPING, FAILING = 30.0, 5.0
GROUPS = ("train", "reward", "judge", "evaluate", "view", "compare", "lab", "inspect", "models", "runs")


class Commands(TyperGroup):
    """All commands: what they take may be a path that begins with ~/, wherever the shell left it as it was. Parameters
    that have a callback of their own (such as `as_written`, for texts) are left alone."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        _take_paths(self)


def _take_paths(command: Any) -> None:
    for parameter in command.params:
        parameter.callback = parameter.callback or _at_home
    for inner in getattr(command, "commands", {}).values():
        _take_paths(inner)


def _at_home(context: Any, parameter: Any, value: Any) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_at_home(context, parameter, item) for item in value)
    return type(value)(at_home(str(value))) if isinstance(value, str | Path) else value


@functools.cache
def application() -> typer.Typer:
    app = typer.Typer(
        cls=Commands,
        name="dualign",
        help="Align language models from online scalar rewards.",
        no_args_is_help=True,
        add_completion=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for group in GROUPS:
        if importlib.util.find_spec(f"dualign.cli.{group}"):
            importlib.import_module(f"dualign.cli.{group}").register(app)
    return app


def _depart(within: float) -> None:
    """Of several processes none ends before the first has said why: a launcher ends the others once one has failed."""
    if "torch.distributed" in sys.modules:
        from dualign.common.processes import Processes

        Processes.current().depart(within)


def main() -> None:
    """Exit codes: 0 done; 2 bad input; 3 stopped cleanly and can be resumed; 130 interrupted."""
    from dualign.common import cpu, launch
    from dualign.common.errors import StopRun, UserError, clean

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    cpu.tune()
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    first = True
    try:
        first = launch.first()
        application()()
    except (UserError, StopRun) as error:
        if first:
            print(clean(f"dualign: {error}"), file=sys.stderr, flush=True)
        _depart(STOPPING if isinstance(error, StopRun) else FAILING)
        sys.exit(error.exit_code)
    except OSError as error:  # a path that is no folder, a disk that is full, a file that may not be written
        where = f"{error.filename}: " if error.filename else ""
        print(clean(f"dualign: {where}{error.strerror or error}"), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        if first:
            print("dualign: interrupted; what was done is kept", file=sys.stderr)
        sys.exit(130)
