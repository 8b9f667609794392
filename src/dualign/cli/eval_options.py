"""The options that evaluations share."""

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
    list[str],
    typer.Argument(help="runs, checkpoints (RUN@best, RUN@3), models, or files of outputs (.jsonl, .json, .parquet)"),
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
Batch = Annotated[
    bool, typer.Option("--batch", help="ask the judge by its server's batch API: about half the price, within a day")
]
Out = Annotated[Path | None, typer.Option(help="a .json file; default: RUN/eval/NAME.json, or eval/NAME.json")]


def loaded(paths: list[str] | None) -> list[Any]:
    """The functions that --function names."""
    from dualign.annotate.function import load_function

    return [load_function(path) for path in paths or ()]
