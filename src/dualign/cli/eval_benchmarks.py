"""eval mtbench | alpaca | ifeval: published benchmarks, from their own files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dualign.cli.eval_options import Batch, Functions, Limit, Out, SystemPrompt, Tokens, loaded

Source = Annotated[str, typer.Argument(help="a run (its last checkpoint), a checkpoint, a model")]
JudgeModel = Annotated[
    str, typer.Option("--judge", help="a YAML file or an inline mapping: {base_url: ..., model: ...}")
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="ask in the model's chat template, or in plain text")]


def register(app: typer.Typer) -> None:
    for command in (mtbench, alpaca, ifeval):
        app.command()(command)


def mtbench(
    source: Source,
    judge: JudgeModel,
    questions: Annotated[Path, typer.Option(help="FastChat's question.jsonl")],
    judge_prompts: Annotated[Path, typer.Option(help="FastChat's judge_prompts.jsonl")],
    system_prompt: SystemPrompt = None,
    max_new_tokens: Tokens = 1024,
    limit: Limit = None,
    batch: Batch = False,
    out: Out = None,
) -> None:
    """MT-Bench: two turns, greedy, each graded 1-10; by category and turn."""
    from dualign.annotate.batch import in_batches
    from dualign.eval.benchmarks import Putting, mt_bench
    from dualign.eval.show import show

    putting = Putting(max_new_tokens, limit, system_prompt=system_prompt)
    with in_batches(wanted=batch):
        show(mt_bench(source, judge, questions, judge_prompts, putting, out))


def alpaca(
    source: Source,
    instructions: Annotated[str, typer.Option(help="AlpacaEval's instructions: a .jsonl[.gz] file or a data set")],
    judge: Annotated[
        str | None, typer.Option(help="any annotator, as for eval winrate; none: only write outputs")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="the baseline's outputs, in AlpacaEval's JSON")] = None,
    column: Annotated[str | None, typer.Option(help="or the column of the instructions that holds them")] = None,
    prompt_column: Annotated[str, typer.Option(help="the column that holds the instruction")] = "instruction",
    chat: Chat = True,
    system_prompt: SystemPrompt = None,
    function: Functions = None,
    official: Annotated[
        str | None, typer.Option(help="run the installed alpaca_eval package with this annotators_config")
    ] = None,
    max_new_tokens: Tokens = 1024,
    limit: Limit = None,
    batch: Batch = False,
    out: Out = None,
) -> None:
    """AlpacaEval: outputs in its JSON format, win rate against the baseline, raw and length-controlled."""
    from dualign.annotate.batch import in_batches
    from dualign.eval.alpaca import official as run_official
    from dualign.eval.benchmarks import Putting, alpaca_eval
    from dualign.eval.show import show

    putting = Putting(max_new_tokens, limit, chat, system_prompt, prompt_column)
    ours = None if official else judge
    with in_batches(wanted=batch):
        files, result = alpaca_eval(source, instructions, putting, ours, reference, column, loaded(function), out)
    print(f"outputs in AlpacaEval's format: {files[0]}, {files[1]}")
    if official:
        raise typer.Exit(run_official(*files, official))
    if result:
        show(result)


def ifeval(
    source: Source,
    prompts: Annotated[str, typer.Option(help="IFEval's prompts, with instruction_id_list and kwargs")],
    prompt_column: Annotated[str, typer.Option(help="the column that holds the prompt")] = "prompt",
    chat: Chat = True,
    system_prompt: SystemPrompt = None,
    max_new_tokens: Tokens = 512,
    limit: Limit = None,
    out: Out = None,
) -> None:
    """IFEval: instructions that a program checks; no judge (needs lm-eval[ifeval])."""
    from dualign.eval.benchmarks import Putting, if_eval
    from dualign.eval.show import show

    show(if_eval(source, prompts, Putting(max_new_tokens, limit, chat, system_prompt, prompt_column), out))
