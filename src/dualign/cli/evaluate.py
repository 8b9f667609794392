"""eval winrate | reward | mtbench | alpaca | ifeval | cheat, and report."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from dualign.cli.eval_options import (
    JUDGE_HELP,
    Batch,
    Chat,
    Functions,
    JudgeSpec,
    K,
    Limit,
    Out,
    PromptColumn,
    Prompts,
    Seed,
    Sources,
    SystemPrompt,
    Temperature,
    Tokens,
    loaded,
)
from dualign.cli.printed import AsJson

TOKENS = 128


class Evaluations(TyperGroup):
    """FILE.py:NAME in a command's place is an evaluation of one's own. --json may stand anywhere."""

    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        others = [argument for argument in arguments if argument != "--json"]
        return super().parse_args(context, ["--json", *others] if len(others) < len(arguments) else arguments)

    def resolve_command(self, context: Any, arguments: list[str]) -> Any:
        from dualign.common.named import is_place

        if not is_place(arguments[0]):
            return super().resolve_command(context, arguments)
        name, command, rest = super().resolve_command(context, [OWN, *arguments])
        return name, _with_settings(command, rest[0]) if "--help" in rest else command, rest


def _with_settings(command: Any, place: str) -> Any:
    """The command, whose help lists what the class at `place` is set by."""
    from dualign.config.keys import of_own, plain

    told = copy.copy(command)
    _, keys = of_own(place)
    told.epilog = f"\b\nSettings of {place}, as key=value:\n{plain(keys) if keys else '  none'}"
    return told


OWN = "FILE.py:NAME"
app = typer.Typer(
    cls=Evaluations, no_args_is_help=True, help="Is it better, by how much, how sure is that, and did it cheat?"
)


@app.callback()
def printed(
    as_json: AsJson = False,
) -> None:
    from dualign.eval.show import AS_JSON

    AS_JSON.set(as_json)


def register(parent: typer.Typer) -> None:
    from dualign.cli import eval_benchmarks

    eval_benchmarks.register(app)
    parent.add_typer(app, name="eval")
    parent.command()(report)


@app.command()
def winrate(
    sources: Sources,
    judge: JudgeSpec = "run",
    against: Annotated[str | None, typer.Option(help="likewise; default: each run's π_0")] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: Chat = None,
    system_prompt: SystemPrompt = None,
    prompt_column: PromptColumn = None,
    max_new_tokens: Tokens = TOKENS,
    temperature: Temperature = 0.0,
    k: K = 1,
    seed: Seed = 0,
    function: Functions = None,
    judge_errors: Annotated[
        Path | None,
        typer.Option(help="what `dualign agreement --out` wrote of this judge: also the corrected win rate"),
    ] = None,
    batch: Batch = False,
    out: Out = None,
) -> None:
    """Win rate of each source against π_0 or another, over a run's checkpoints and the labels it bought."""
    from dualign.annotate.batch import in_batches
    from dualign.eval.asking import Asking
    from dualign.eval.evaluate import win_rate
    from dualign.eval.show import show

    asking = Asking(prompts, limit, max_new_tokens, temperature, k, seed, chat, system_prompt, prompt_column)
    with in_batches(wanted=batch):
        show(win_rate(sources, judge, against, asking, loaded(function), out, judge_errors))


@app.command()
def reward(
    sources: Sources,
    judge: JudgeSpec = "run",
    second: Annotated[str | None, typer.Option(help="another judge of the same outputs: " + JUDGE_HELP)] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: Chat = None,
    system_prompt: SystemPrompt = None,
    prompt_column: PromptColumn = None,
    max_new_tokens: Tokens = TOKENS,
    temperature: Temperature = 0.0,
    k: K = 1,
    seed: Seed = 0,
    function: Functions = None,
    batch: Batch = False,
    out: Out = None,
) -> None:
    """Mean reward of each source, and with --second whether the gain survives another judge."""
    from dualign.annotate.batch import in_batches
    from dualign.eval.asking import Asking
    from dualign.eval.evaluate import mean_reward
    from dualign.eval.show import show

    asking = Asking(prompts, limit, max_new_tokens, temperature, k, seed, chat, system_prompt, prompt_column)
    with in_batches(wanted=batch):
        show(mean_reward(sources, judge, second, asking, loaded(function), out))


@app.command()
def cheat(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    second: Annotated[
        str | None, typer.Option(help="an independent reward that was never trained on: " + JUDGE_HELP)
    ] = None,
    until: Annotated[int | None, typer.Option(min=1, help="as seen after so many online batches")] = None,
    function: Functions = None,
    batch: Batch = False,
    out: Out = None,
) -> None:
    """Signs of overoptimisation, batch by batch, and a verdict in plain words."""
    from dualign.annotate.batch import in_batches
    from dualign.eval.evaluate import cheating
    from dualign.eval.show import show

    with in_batches(wanted=batch):
        show(cheating(run, second, until, loaded(function), out))


@app.command(OWN)
def own(
    evaluation: Annotated[str, typer.Argument(metavar=OWN, help="FILE.py:NAME or package.module:NAME")],
    given: Annotated[list[str], typer.Argument(metavar="SOURCE... [key=value...]", help="what is evaluated; settings")],
    prompts: Prompts = None,
    limit: Limit = None,
    chat: Chat = None,
    system_prompt: SystemPrompt = None,
    prompt_column: PromptColumn = None,
    max_new_tokens: Tokens = TOKENS,
    temperature: Temperature = 0.0,
    k: K = 1,
    seed: Seed = 0,
    batch: Batch = False,
    out: Out = None,
) -> None:
    """An evaluation of your own (docs/evaluation.md says how to add one)."""
    from dualign.annotate.batch import in_batches
    from dualign.eval.asking import Asking
    from dualign.eval.evaluation import evaluate, opened
    from dualign.eval.show import show

    asking = Asking(prompts, limit, max_new_tokens, temperature, k, seed, chat, system_prompt, prompt_column)
    settings = [text for text in given if re.match(r"\w+=", text) and not Path(text).exists()]
    sources = [text for text in given if text not in settings]
    with in_batches(wanted=batch):
        show(evaluate(opened(evaluation, settings), sources, asking, out))


def report(
    runs: Annotated[list[Path], typer.Argument(help="runs' folders; several are laid over one another")],
    out: Annotated[Path | None, typer.Option(help="an .html file; default: RUN/report/index.html")] = None,
) -> None:
    """One self-contained page about runs, with PNG and CSV of every figure beside it."""
    from dualign.eval.report import write_report

    path = write_report(runs, out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB); figures as PNG and CSV in {path.parent / 'figures'}")
