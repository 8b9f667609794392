"""eval mtbench | alpaca | ifeval: published benchmarks, from their own files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dualign.common.paths import as_written

if TYPE_CHECKING:
    from dualign.data.settings import DataConfig
    from dualign.eval.outputs import Generation, Outputs
    from dualign.models.settings import ModelConfig

Source = Annotated[str, typer.Argument(help="a run (its last checkpoint), a checkpoint, a model")]
JudgeModel = Annotated[
    str, typer.Option("--judge", help="a YAML file or an inline mapping: {base_url: ..., model: ...}")
]
Chat = Annotated[bool, typer.Option("--chat/--no-chat", help="ask in the model's chat template, or in plain text")]
Functions = Annotated[
    list[str] | None,
    typer.Option(help="FILE.py:NAME of a Python function that dualign.train(reward=...) gave to the run"),
]
SystemPrompt = Annotated[
    str | None,
    typer.Option(
        help="put before every conversation that has none; default: the run's data.system_prompt; '': none",
        callback=as_written,
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="so many, always the same draw")]
Tokens = Annotated[int, typer.Option(min=1, help="longest answer")]
Out = Annotated[Path | None, typer.Option(help="a .json file; default: RUN/eval/NAME.json, or eval/NAME.json")]
TOKENS = {"mtbench": 1024, "alpaca": 1024, "ifeval": 512}  # longest answers


def register(app: typer.Typer) -> None:
    for command in (mtbench, alpaca, ifeval):
        app.command()(command)


def mtbench(
    source: Source,
    judge: JudgeModel,
    questions: Annotated[Path, typer.Option(help="FastChat's question.jsonl")],
    judge_prompts: Annotated[Path, typer.Option(help="FastChat's judge_prompts.jsonl")],
    system_prompt: SystemPrompt = None,
    max_new_tokens: Tokens = TOKENS["mtbench"],
    limit: Limit = None,
    out: Out = None,
) -> None:
    """MT-Bench: two turns, greedy, each graded 1-10; by category and turn."""
    from dualign import data
    from dualign.eval import judges, mtbench, results, show

    asked = _put(source, str(questions), True, system_prompt)
    path, how = _setting(source, "mtbench", max_new_tokens, out, asked, judge, limit, system_prompt)
    prompts = mtbench.load_prompts(judge_prompts)
    chosen = data.draw(mtbench.load_questions(questions), limit)
    answers = mtbench.answer(_model(source), chosen, how)
    client, settings = judges.open_client(judge, ledger=path.parent / "spent.sqlite", max_tokens=2048)
    try:
        ratings = mtbench.grade(client, settings, prompts, chosen, answers)
    finally:
        client.close()
    result = results.provenance("mtbench", settings.model_dump(mode="json"), 0) | _about(source, path, how)
    result |= mtbench.table(chosen, ratings)
    rows = [
        {"id": q.id, "category": q.category, "turn": t + 1, "answer": a[t].given, "rating": r[t].value, "reason": r[t].reason,
         "note": r[t].note}
        for q, a, r in zip(chosen, answers, ratings, strict=True) for t in (0, 1)
    ]  # fmt: skip
    results.write(path, result, rows)
    show.mtbench(result, path)


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
    max_new_tokens: Tokens = TOKENS["alpaca"],
    limit: Limit = None,
    out: Out = None,
) -> None:
    """AlpacaEval: outputs in its JSON format, win rate against the baseline, raw and length-controlled."""
    from dualign import data
    from dualign.annotate.function import load_function
    from dualign.eval import alpaca, judges, outputs, results, show, winrate
    from dualign.eval.asking import load_prompts

    asked = _put(source, instructions, chat, system_prompt, prompt_column)
    prompts = data.draw(load_prompts(instructions, asked, "eval"), limit)
    theirs = alpaca.baseline(prompts, column, reference, asked)
    name = "-against-".join(["alpaca", *([alpaca.slug(column, reference)] if column or reference else [])])
    path, how = _setting(source, name, max_new_tokens, out, asked, judge, limit, system_prompt)
    ours = _answers(source, prompts, how)
    files = path.with_name(f"{path.stem}-outputs.json"), path.with_name(f"{path.stem}-reference.json")
    for file, answers in zip(files, (ours, theirs), strict=True):
        alpaca.write_outputs(file, answers)
    print(f"outputs in AlpacaEval's format: {files[0]}, {files[1]}")
    if official is not None:
        raise typer.Exit(alpaca.official(*files, official))
    if judge is None:
        return
    run = source if outputs.is_run(source) else None
    with judges.open_judge(judge, run, path.parent, list(map(load_function, function or ()))) as chosen:
        pairs = judges.judge_pairs(chosen, ours, theirs)
    point = winrate.measure(ours, theirs, pairs)
    about = _about(source, path, how) | {"judge": chosen.record(), "against": {"source": None, "name": theirs.name}}
    result = results.provenance("alpaca", chosen.record(), 0)
    result |= {"prompts": len(prompts), "headline": f"{alpaca.headline(point)} against {theirs.name}"}
    result["systems"] = [about | {"points": [point]}]
    results.write(path, result, [winrate.row(ours.name, pair) for pair in pairs])
    show.winrate(result, path)


def ifeval(
    source: Source,
    prompts: Annotated[str, typer.Option(help="IFEval's prompts, with instruction_id_list and kwargs")],
    prompt_column: Annotated[str, typer.Option(help="the column that holds the prompt")] = "prompt",
    chat: Chat = True,
    system_prompt: SystemPrompt = None,
    max_new_tokens: Tokens = TOKENS["ifeval"],
    limit: Limit = None,
    out: Out = None,
) -> None:
    """IFEval: instructions that a program checks; no judge (needs lm-eval[ifeval])."""
    from dualign import data
    from dualign.eval import ifeval, results, show
    from dualign.eval.asking import load_prompts

    ifeval.library()
    asked = _put(source, prompts, chat, system_prompt, prompt_column)
    path, how = _setting(source, "ifeval", max_new_tokens, out, asked, None, limit, system_prompt)
    chosen = data.draw(load_prompts(prompts, asked, "train"), limit)
    ours = _answers(source, chosen, how)
    rows = ifeval.check([a for answers in ours.answers.values() for a in answers])
    result = results.provenance("ifeval", None, 0) | _about(source, path, how) | ifeval.table(rows)
    results.write(path, result, rows)
    show.ifeval(result, path)


def _put(source: str, prompts: str, chat: bool, system_prompt: str | None, prompt_column: str = "prompt") -> DataConfig:
    """How the benchmark's prompts are put to the model: by its own rules, with the run's system prompt."""
    from dualign.eval.asking import Asking, put

    return put([source], prompts, Asking(chat=chat, system_prompt=system_prompt, prompt_column=prompt_column))


def _setting(
    source: str,
    name: str,
    max_new_tokens: int,
    out: Path | None,
    asked: DataConfig,
    judge: str | None,
    limit: int | None,
    system_prompt: str | None,
) -> tuple[Path, Generation]:
    """Where the result goes (another judge or way of asking has another file), and how the source is sampled."""
    from dualign.eval import outputs
    from dualign.eval.places import named, slug

    usual = {"chat": True, "limit": None, "system_prompt": None, "max_new_tokens": TOKENS[name.partition("-")[0]]}
    given = {"chat": asked.chat, "limit": limit, "system_prompt": system_prompt, "max_new_tokens": max_new_tokens}
    stem = f"{name}-{slug(judge)}" if judge else name
    stem = named(stem, [judge], {key: value for key, value in given.items() if value != usual[key]})
    folder = Path(source) / "eval" if outputs.is_run(source) else Path("eval")
    path = out or folder / f"{stem}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, outputs.Generation(None, max_new_tokens, 0.0, 1, 0, path.parent / "outputs", asked)


def _about(source: str, path: Path, how: Generation) -> dict[str, Any]:
    """For results: whose answers they are, and how it was asked."""
    from dualign.eval import results

    assert how.data is not None
    asked = {"prompts": how.data.train, "chat": how.data.chat, "system_prompt": how.data.system_prompt,
             "max_new_tokens": how.max_new_tokens, "temperature": how.temperature}  # fmt: skip
    return {"source": source, "run": results.away(source, path), "sampling": asked}


def _model(source: str) -> ModelConfig:
    """What is sampled: a run's last checkpoint, else what was named. Raises UserError for a run without one."""
    from dualign.common.errors import UserError
    from dualign.config import load
    from dualign.eval import outputs
    from dualign.models.settings import ModelConfig
    from dualign.run.folder import Run

    if not outputs.is_run(source):
        return ModelConfig(name=source)
    saved = Run.open(Path(source)).saved()
    if not saved:
        raise UserError(f"{source}: the run has no checkpoint yet")
    return outputs.saved_model(load(Path(source) / "config.yaml").model, saved[-1])


def _answers(source: str, prompts: list[Any], how: Generation) -> Outputs:
    """Greedy answers. Raises UserError where there is none at all."""
    from dataclasses import replace

    from dualign.eval import outputs

    found = outputs.generate(_model(source), replace(how, prompts=prompts))
    return outputs.Outputs(Path(source).name, outputs.grouped(found)).checked(source)
