"""eval winrate | reward | mtbench | alpaca | ifeval | cheat, and report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dualign.common.paths import as_written

JUDGE_HELP = (
    "builtin:NAME or a head file; FILE.py:FUNCTION; a YAML file or inline mapping of reward settings; "
    "run: the run's own reward"
)
Sources = Annotated[
    list[str], typer.Argument(help="runs, checkpoints, models, or files of outputs (.jsonl, .json, .parquet)")
]
JudgeSpec = Annotated[str, typer.Option("--judge", help=JUDGE_HELP)]
Prompts = Annotated[
    str | None, typer.Option(help="held-out prompts to sample on; default: what a run's own evaluations sampled")
]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--no-chat", help="plain-text prompts as a user's message; default: as the run's data.chat"),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        help="put before every conversation that has none; default: the run's data.system_prompt; '': none",
        callback=as_written,
    ),
]
PromptColumn = Annotated[
    str | None, typer.Option(help="the column that holds the prompt; default: the run's data.prompt_column")
]
Functions = Annotated[
    list[str] | None,
    typer.Option(
        help="FILE.py:NAME of a Python function that dualign.train(reward=...) gave to the run; may be repeated"
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="so many prompts, always the same draw")]
Tokens = Annotated[int, typer.Option(min=1, help="longest answer")]
Temperature = Annotated[float, typer.Option(min=0, help="0: greedy")]
K = Annotated[int, typer.Option("--k", min=1, help="answers per prompt")]
Seed = Annotated[int, typer.Option()]
Out = Annotated[Path | None, typer.Option(help="a .json file; default: RUN/eval/NAME.json, or eval/NAME.json")]

TOKENS = 128

app = typer.Typer(no_args_is_help=True, help="Is it better, by how much, how sure is that, and did it cheat?")


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
    out: Out = None,
) -> None:
    """Win rate of each source against π_0 or another, over a run's checkpoints and the labels it bought."""
    from dualign.eval import show
    from dualign.eval.asking import Asking
    from dualign.eval.evaluate import win_rate

    asking = Asking(prompts, limit, max_new_tokens, temperature, k, seed, chat, system_prompt, prompt_column)
    show.winrate(*win_rate(sources, judge, against, asking, _loaded(function), out))


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
    out: Out = None,
) -> None:
    """Mean reward of each source, and with --second whether the gain survives another judge."""
    from dualign.eval import show
    from dualign.eval.asking import Asking
    from dualign.eval.evaluate import mean_reward

    asking = Asking(prompts, limit, max_new_tokens, temperature, k, seed, chat, system_prompt, prompt_column)
    show.reward(*mean_reward(sources, judge, second, asking, _loaded(function), out))


def _loaded(paths: list[str] | None) -> list[Any]:
    from dualign.annotate.function import load_function

    return [load_function(path) for path in paths or ()]


@app.command()
def cheat(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    second: Annotated[
        str | None, typer.Option(help="an independent reward that was never trained on: " + JUDGE_HELP)
    ] = None,
    until: Annotated[int | None, typer.Option(min=1, help="as seen after so many online batches")] = None,
    function: Functions = None,
    out: Out = None,
) -> None:
    """Signs of overoptimisation, batch by batch, and a verdict in plain words."""
    from dualign.eval import show
    from dualign.eval.evaluate import cheating

    show.cheat(*cheating(run, second, until, _loaded(function), out))


def report(
    runs: Annotated[list[Path], typer.Argument(help="runs' folders; several are laid over one another")],
    out: Annotated[Path | None, typer.Option(help="an .html file; default: RUN/report/index.html")] = None,
) -> None:
    """One self-contained page about runs, with PNG and CSV of every figure beside it."""
    from dualign.eval.report import write_report

    path = write_report(runs, out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB); figures as PNG and CSV in {path.parent / 'figures'}")
