"""judge, labels, agreement, granularity: labels bought from a judge, kept, and held against people's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from dualign.cli.printed import AsJson, check_json, document, write_document

if TYPE_CHECKING:
    from dualign.common.types import Label

Rubric = Annotated[str, typer.Option(help="summarization, helpfulness, harmlessness, or a YAML file")]
BaseUrl = Annotated[str | None, typer.Option(help="an OpenAI-compatible server, for example http://localhost:8000/v1")]
Model = Annotated[str | None, typer.Option(help="the model's name at that server")]
Serve = Annotated[
    str | None,
    typer.Option(help="instead of a server: a model to serve meanwhile, or a mapping such as {model: M, by: vllm}"),
]
More = Annotated[
    list[str] | None,
    typer.Option("--set", help="any other setting of the judge: --set max_dollars=5 --set concurrency=16"),
]
Batch = Annotated[
    bool, typer.Option("--batch", help="by the server's batch API: about half the price, within a day (docs/judges.md)")
]
Limit = Annotated[int | None, typer.Option(min=1, help="so many rows, drawn at random, always the same ones")]
PromptColumn = Annotated[str, typer.Option(help="the column that holds the prompt")]
Out = Annotated[Path | None, typer.Option(help="also write the document that --json prints to this .json file")]
T = TypeVar("T")


def register(app: typer.Typer) -> None:
    for command in (judge, labels, agreement, granularity):
        app.command()(command)


def judge(
    file: Annotated[
        str, typer.Argument(help="rows with a prompt and completion, chosen/rejected or response_a/response_b")
    ],
    rubric: Rubric,
    out: Annotated[Path | None, typer.Option(help="a .jsonl or .parquet file")] = None,
    base_url: BaseUrl = None,
    model: Model = None,
    serve: Serve = None,
    show: Annotated[
        int | None,
        typer.Option(min=1, help="print so many rows: what the judge reads, what it says, the label; no file"),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="AI preferences: which of a row's two responses is better")
    ] = False,
    limit: Limit = None,
    prompt_column: PromptColumn = "prompt",
    batch: Batch = False,
    more: More = None,
    as_json: AsJson = False,
) -> None:
    """Label a file with an LLM judge. Run it again to continue: what was bought is in the cache."""
    from dualign.annotate.batch import in_batches
    from dualign.annotate.labelled import write_rows
    from dualign.annotate.told import absent_words
    from dualign.common.errors import UserError, clean
    from dualign.data.responses import load_responses
    from dualign.data.settings import DataConfig

    if (out is None) == (show is None):
        raise UserError("say where the labels go (--out FILE), or look at some of them (--show 3)")
    rows = load_responses(file, limit, DataConfig(train=file, prompt_column=prompt_column))[:show]
    settings = {"rubric": rubric, **_server(base_url, model, serve), **_settings(more)}
    absent: list[Label] = []
    looked_at = show is not None
    label = _compared(rows, settings, file, looked_at) if pairs else _rewarded(rows, settings, looked_at)
    if out is None:
        if as_json:
            document(list(label))
            return
        for row in label:
            typer.echo(clean(_shown(row)))
        return
    total = len(rows) if pairs else sum(len(row.texts) for row in rows)
    with in_batches(out.with_name(f"{out.name}.batch"), wanted=batch):
        write_rows(out, _collect(_progress(label, total, "labels"), absent))
    if as_json:
        document(
            {
                "out": out,
                "asked": total,
                "labelled": total - len(absent),
                "absent": Counter(label.reason for label in absent),
            }
        )
        return
    typer.echo(f"{total - len(absent)} of {total} labelled, in {out}")
    if absent:
        typer.echo(f"  absent: {clean(absent_words(absent))}")


def _rewarded(rows: Sequence[Any], settings: dict[str, Any], show: bool) -> Iterator[dict[str, Any]]:
    """A row per response, in order. Raises StopRun where the judge or the budget ends it."""
    from dualign.annotate.base import Item
    from dualign.annotate.judge import JudgeAnnotator, windowed
    from dualign.common.types import Label

    judge = JudgeAnnotator(_validated("judge", settings))
    responses = [(row, name) for row in rows for name in row.texts]

    def ask(response: tuple[Any, str]) -> Any:
        row, name = response
        text = row.texts[name]
        return None if text is None else judge.ask(Item(0, 0, row.prompt, text))

    try:
        for (row, name), asked in windowed(responses, ask, 4 * judge.settings.concurrency):
            label = Label.absent(row.reasons[name]) if asked is None else judge.combine(asked)
            yield {"id": row.id, "response": name, "prompt": row.prompt.messages, "completion": row.texts[name],
                   "reward": label.value, "reason": label.reason, "note": label.note,
                   "asked": show and asked and judge.asked_text(Item(0, 0, row.prompt, row.texts[name]))}  # fmt: skip
        _answered(judge.client, sum(text is not None for row in rows for text in row.texts.values()))
    finally:
        judge.close()


def _compared(rows: Sequence[Any], settings: dict[str, Any], file: str, show: bool) -> Iterator[dict[str, Any]]:
    """A row per pair: value 1 where the first response won, 0 where it lost, 0.5 for a tie."""
    from dualign.annotate.judge import windowed
    from dualign.annotate.preference import PreferenceAnnotator, Verdict
    from dualign.common.errors import UserError

    if any(len(row.texts) != 2 for row in rows):
        raise UserError(f"{file}: --pairs needs two responses in every row (chosen/rejected or response_a/response_b)")
    judge = PreferenceAnnotator(_validated("preference", settings))

    def ask(row: Any) -> Any:
        return None if row.absent else judge.compare(row.prompt, *row.texts.values())

    try:
        for row, pair in windowed(rows, ask, 2 * judge.settings.concurrency):
            verdict = pair.verdict() if pair else Verdict(None, None, row.absent)
            names = dict(zip("ab", row.texts, strict=True))
            better = {1.0: names["a"], 0.0: names["b"], 0.5: "tie", None: None}[verdict.value]
            yield {"id": row.id, "prompt": row.prompt.messages, **row.texts, "value": verdict.value, "better": better,
                   "first_order": verdict.ab and names[verdict.ab], "second_order": verdict.ba and names[verdict.ba],
                   "reason": verdict.reason, "note": verdict.note,
                   "asked": show and pair and judge.asked_text(row.prompt, *row.texts.values())}  # fmt: skip
        _answered(judge.client, sum(not row.absent for row in rows))
    finally:
        judge.close()


def _answered(client: Any, asked: int) -> None:
    """Raises StopRun where there was no reply at all."""
    from dualign.common.errors import StopRun

    if asked and not client.answered:
        raise StopRun("the judge never answered: nothing was labelled and nothing written. Run again when it is back")


def labels(
    cache: Annotated[Path | None, typer.Option(help="the cache's file; default: the one in your cache folder")] = None,
    export: Annotated[Path | None, typer.Option(help="write every reply with its request to this .jsonl file")] = None,
    as_json: AsJson = False,
) -> None:
    """What is in the cache of labels, and what it saved."""
    from rich.console import Console
    from rich.table import Table

    from dualign.annotate.cache import Cache, default_path
    from dualign.annotate.labelled import write_rows
    from dualign.common.errors import UserError

    path = cache or default_path()
    if not path.is_file():
        raise UserError(f"{path}: no cache there; labels are kept from the first one that is bought")
    kept = Cache(path)
    if as_json:
        document({"cache": path, "labels": kept.summary()})
    else:
        table = Table("model", "rubric", "labels", "calls saved", "tokens saved", "dollars saved", title=str(path))
        for row in kept.summary():
            table.add_row(row["model"], row["rubric"], f"{row['labels']:,}", f"{row['saved_calls']:,}",
                          f"{row['saved_tokens']:,}", f"{row['saved_dollars']:.4f}")  # fmt: skip
        Console().print(table)
    if export:
        if export.suffix != ".jsonl":
            raise UserError(f"{export}: labels are exported as .jsonl")
        write_rows(export, kept.rows())


def agreement(
    files: Annotated[
        list[str],
        typer.Argument(
            help="pairs that people labelled: chosen/rejected, or response_a/_b and label; or a file of JudgeBench or "
            "RewardBench 2 as it is"
        ),
    ],
    rubric: Annotated[str | None, typer.Option(help="of the judge")] = None,
    base_url: BaseUrl = None,
    model: Model = None,
    serve: Serve = None,
    head: Annotated[
        list[str] | None, typer.Option(help="a reward head: builtin:NAME or a file; may be repeated")
    ] = None,
    limit: Limit = None,
    prompt_column: PromptColumn = "prompt",
    more: More = None,
    out: Out = None,
    plot: Annotated[Path | None, typer.Option(help="draw the shares to this file (.png, .svg, .pdf)")] = None,
    page: Annotated[Path | None, typer.Option(help="write verdict and tables to this .html file")] = None,
    as_json: AsJson = False,
) -> None:
    """Is this judge any good? AI rewards, AI preferences and reward heads beside people and the longer answer."""
    from dualign.annotate.rubric import load
    from dualign.annotate.serve import held
    from dualign.common.errors import UserError
    from dualign.eval.agreement import measure_file, result, write_plot
    from dualign.eval.show import show

    given = _server(base_url, model, serve) | ({"rubric": rubric} if rubric else {})
    if given and not ({"rubric", "base_url", "model"} <= given.keys() or {"rubric", "serve"} <= given.keys()):
        raise UserError("a judge needs --rubric, and --base-url and --model or --serve")
    if plot and plot.suffix not in (".png", ".svg", ".pdf"):  # said before anything is bought
        raise UserError(f"--plot {plot}: a figure ends in .png, .svg or .pdf")
    check_json(out)
    if page and page.suffix != ".html":
        raise UserError(f"--page {page}: a page is an .html file")
    settings = {**given, **_settings(more)}
    reward = preference = None
    if given:  # what the rubric has no words for is not measured
        asks = load(str(rubric))
        reward = _validated("judge", settings) if asks.reward or asks.checklist else None
        preference = _validated("preference", settings) if asks.preference else None
    with held([reward or preference]):
        reports = [measure_file(file, limit, head or [], reward, preference, prompt_column) for file in files]
    found = result(reports)
    if as_json:
        document(reports)
    else:
        show(found)
    if out:
        write_document(out, reports)
    if page:
        from dualign.eval.report.judge_page import write_page

        write_page(found, files, page)
    if plot:
        write_plot(reports, plot)


def granularity(
    a: Annotated[Path, typer.Argument(help="rewards that `dualign judge` wrote; its ties are looked at")],
    b: Annotated[Path, typer.Argument(help="rewards of another judge for the same rows")],
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Pearson's r between two judges' rewards: over all rows, and over the pairs that the first one ties."""
    from rich.console import Console
    from rich.table import Table

    from dualign.annotate.agreement import granularity as correlate
    from dualign.annotate.labelled import read_rewards
    from dualign.common.errors import UserError

    check_json(out)
    found = correlate(read_rewards(a), read_rewards(b))
    if found.rows < 2:
        raise UserError(f"{a} and {b} have {found.rows} labelled rows in common; they must be labels of the same file")
    if as_json:
        document(vars(found))
    else:
        table = Table("", "rows", "r")
        table.add_row("all", f"{found.rows:,}", f"{found.r:.4f}")
        table.add_row(f"tied by {a.stem}", f"{found.tied_rows:,}", f"{found.r_tied:.4f}")
        Console().print(table)
    if out:
        write_document(out, vars(found))


# ---- parts -----------------------------------------------------------------------------------------------------------


def _settings(more: list[str] | None) -> dict[str, Any]:
    """`key=value` settings, values read as YAML reads them."""
    from dualign.common.errors import UserError
    from dualign.common.yaml_text import parse_yaml

    settings = {}
    for text in more or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value")
        settings[key.strip()] = parse_yaml(value, f"--set {text}")
    if idle := settings.keys() & {"type", "weight", "clip", "normalise", "gate", "where", "optional"}:
        raise UserError(f"--set {min(idle)}: it says how rewards are combined in a run; nothing is combined here")
    return settings


def _server(base_url: str | None, model: str | None, serve: str | None) -> dict[str, Any]:
    """Of these settings those that are given."""
    from dualign.common.yaml_text import parse_yaml

    served = parse_yaml(serve, "--serve") if serve and serve.lstrip().startswith("{") else serve
    return {key: value for key, value in (("base_url", base_url), ("model", model), ("serve", served)) if value}


def _validated(kind: str, settings: dict[str, Any]) -> Any:
    from pydantic import ValidationError

    from dualign.annotate.endpoints import JudgeReward, PreferenceReward
    from dualign.common.errors import UserError
    from dualign.common.settings import problems

    model: Any = {"judge": JudgeReward, "preference": PreferenceReward}[kind]
    try:
        return model(**{k: v for k, v in settings.items() if kind == "judge" or k != "expected_score"})
    except ValidationError as error:
        raise UserError(f"the judge's settings: {'; '.join(problems(error))}") from None


def _progress(rows: Iterable[T], total: int, what: str) -> Iterator[T]:
    from rich.console import Console
    from rich.progress import track

    return iter(track(rows, what, total, console=Console(stderr=True), transient=True))


def _collect(rows: Iterable[dict[str, Any]], absent: list[Label]) -> Iterator[dict[str, Any]]:
    """Passes rows on without what was asked, and keeps the labels that are absent."""
    from dualign.common.types import Label

    for row in rows:
        if row["reason"]:
            absent.append(Label.absent(row["reason"], note=row["note"]))
        yield {key: value for key, value in row.items() if key != "asked"}


def _shown(row: dict[str, Any]) -> str:
    """One row for people: the request's text, the judge's words, and what was read from them."""
    value = row["reward"] if "reward" in row else row["better"]
    label = f"absent: {row['reason']}" if value is None else value
    name = f" {row['response']}" if "response" in row else ""
    return f"--- {row['id']}{name}\n{row['asked'] or ''}\n\n>>> {row['note'] or ''}\n\n=== {label}\n"
