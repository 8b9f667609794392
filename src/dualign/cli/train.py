"""train, resume, sample, recipes, keys."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualign.cli.printed import AsJson, document
from dualign.common.paths import as_written

if TYPE_CHECKING:
    from dualign.config import Config

Overrides = Annotated[list[str] | None, typer.Argument(help="key.sub=value, for example train.lr=1e-5")]


def register(app: typer.Typer) -> None:
    app.command()(train)
    app.command()(resume)
    app.command()(sample)
    app.command()(recipes)
    app.command()(keys)


def train(
    recipe: Annotated[str, typer.Argument(help="a YAML file, or the name of a shipped recipe")],
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the plan and stop")] = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="plan for so many GPUs, of all nodes together; default: this machine")
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="plan for so many nodes")] = 1,
    gpu_memory: Annotated[
        float | None, typer.Option(min=1, help="GB of each GPU; exit code 2 where the run does not fit")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Align a model by a recipe."""
    from dualign import config as configs
    from dualign.common.errors import UserError

    elsewhere = bool(gpus or nodes > 1 or gpu_memory)
    config = configs.load(recipe, overrides or (), bf16=True if elsewhere else None)
    if dry_run:
        from dualign.training.plan import make_plan, refuse

        found = make_plan(config, gpus, nodes, gpu_memory, (lambda line: None) if as_json else print)
        if as_json:
            document(found)
        refuse(found["faults"])
        return
    if as_json:
        raise UserError("--json is for --dry-run; a run's numbers are in its metrics.jsonl and summary.json")
    if elsewhere:
        raise UserError("--gpus, --nodes and --gpu-memory are for --dry-run; a launcher starts a run on several GPUs")
    _fit(config)


def resume(
    run: Annotated[Path, typer.Argument(help="the run's folder")],
    overrides: Overrides = None,
) -> None:
    """Resume a run that was stopped or killed. It reaches the weights that it would have reached."""
    from dualign.training.resume import resumed_config

    _fit(resumed_config(run, overrides or ()), resume=True)


def sample(
    model: Annotated[
        str, typer.Argument(help="a run (RUN, RUN@best, RUN@3), a model's folder, an embedded default or a hub name")
    ],
    prompts: Annotated[
        str, typer.Argument(help="a prompts file, builtin:quickstart, or the prompt itself", callback=as_written)
    ],
    out: Annotated[Path | None, typer.Option(help="write JSON Lines here instead of printing")] = None,
    k: Annotated[int, typer.Option(min=1, help="completions per prompt")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="0: greedy")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.001, max=1)] = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="at most so many prompts")] = None,
    seed: Annotated[int, typer.Option()] = 0,
    chat: Annotated[bool, typer.Option(help="a file's plain-text prompts as a user's message")] = False,
    prompt_column: Annotated[str, typer.Option(help="a file's column that holds the prompt")] = "prompt",
    system_prompt: Annotated[
        str | None,
        typer.Option(
            help="put before every conversation that has none, as data.system_prompt is in a run", callback=as_written
        ),
    ] = None,
) -> None:
    """Sample completions from a model."""
    _quiet()
    from dualign.rollout.sample import sample_to
    from dualign.run.named import checkpoint_of

    model = checkpoint_of(model)
    sample_to(
        model, prompts, out, k, max_new_tokens, temperature, top_p, limit, seed, chat, prompt_column, system_prompt
    )


def recipes() -> None:
    """List the recipes that ship with the package."""
    from dualign import config as configs

    for name, path in configs.recipes().items():
        first = path.read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:36} {first.removeprefix('#').strip() if first.startswith('#') else ''}")


def keys(
    sections: Annotated[
        list[str] | None, typer.Argument(help="train, algo, dar, judge, ..., FILE.py:NAME; none: all")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="all of them, as docs/configuration.md has them")] = False,
) -> None:
    """Every key of a recipe: what it takes, its default, what it does."""
    from dualign.config import keys as reference

    if markdown:
        print(reference.markdown(), end="")
        return
    for heading, every in reference.matching(sections or []):
        print(f"\n{heading}\n{reference.plain(every)}")


def _fit(config: Config, resume: bool = False) -> None:
    _quiet()
    from dualign.common.errors import StopRun
    from dualign.trainer import train as fit

    try:
        fit(config, resume=resume)
    except StopRun as stop:
        raise StopRun(f"{stop}\nto go on: dualign resume {config.run.dir}") from stop
    _leave_group()


def _leave_group() -> None:
    """For a process of several whose work is done: else the group's threads outlive what they talk to."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _quiet() -> None:
    """Libraries' progress bars and advice do not belong in our view."""
    import logging
    import warnings

    from transformers.utils import logging as hf

    hf.set_verbosity_error()
    hf.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
