"""eval winrate | reward | mtbench | alpaca | ifeval | cheat, and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from dualign.eval.judges import Judge
    from dualign.eval.outputs import Generation, Outputs

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
    max_new_tokens: Tokens = TOKENS,
    temperature: Temperature = 0.0,
    k: K = 1,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Win rate of each source against π_0 or another, over a run's checkpoints and the labels it bought."""
    from dualign.eval import cost, outputs, results, show
    from dualign.eval import winrate as rates

    path, how = _setting(
        sources, prompts, limit, max_new_tokens, temperature, k, seed, out, "winrate", judge, chat, against
    )
    systems, rows, last = [], [], []
    with _judge(judge, sources, path) as chosen:
        other = outputs.points(against, how)[-1] if against else None
        for source in sources:
            points, b = rates.sides(source, outputs.points(source, how), other)
            table, pairs = rates.curve(chosen, points, b, seed)
            systems.append({"source": source, "points": table, **cost.of_system(source, table[-1])})
            rows += [rates.row(p.name, pair) for p, found in zip(points, pairs, strict=True) for pair in found]
            last.append(pairs[-1])
    result = results.provenance("winrate", {"name": chosen.name, "settings": chosen.settings}, seed)
    result |= {"prompts": len({pair.key for pair in last[0]}), "systems": systems}
    if len(sources) > 1:
        result["seeds"] = rates.across_seeds(last)
    results.write(path, result, rows)
    show.winrate(result, path)


@app.command()
def reward(
    sources: Sources,
    judge: JudgeSpec = "run",
    second: Annotated[str | None, typer.Option(help="another judge of the same outputs: " + JUDGE_HELP)] = None,
    prompts: Prompts = None,
    limit: Limit = None,
    chat: Chat = None,
    max_new_tokens: Tokens = TOKENS,
    temperature: Temperature = 0.0,
    k: K = 1,
    seed: Seed = 0,
    out: Out = None,
) -> None:
    """Mean reward of each source, and with --second whether the gain survives another judge."""
    from dualign.eval import outputs, results, rewards, show

    path, how = _setting(sources, prompts, limit, max_new_tokens, temperature, k, seed, out, "reward", judge, chat)
    systems: list[dict[str, Any]] = []
    all_points = [outputs.points(source, how) for source in sources]
    first = [_scored(judge, sources, path, points) for points in all_points]
    name = {"judge": judge}
    for source, points, values in zip(sources, all_points, first, strict=True):
        systems.append({"source": source, "points": rewards.curve(points, values)})
    if second:
        name["second"] = second
        for system, points, values in zip(systems, all_points, first, strict=True):
            others = _scored(second, sources, path, points)
            system |= {"second_points": rewards.curve(points, others), "swap": rewards.swap(points, values, others)}
    result = results.provenance("reward", name, seed) | {"systems": systems}
    results.write(path, result)
    show.reward(result, path)


def _scored(spec: str, sources: list[str], path: Path, points: list[Outputs]) -> Any:
    from dualign.eval import rewards

    with _judge(spec, sources, path) as judge:
        return rewards.scored(judge, points)


def _judge(spec: str, sources: list[str], path: Path) -> Judge:
    from dualign.eval import judges, outputs

    run = next((s for s in sources if outputs.is_run(s)), None)
    path.parent.mkdir(parents=True, exist_ok=True)
    return judges.open_judge(spec, run, ledger=path.parent)


def _setting(
    sources: list[str],
    prompts: str | None,
    limit: int | None,
    max_new_tokens: int,
    temperature: float,
    k: int,
    seed: int,
    out: Path | None,
    kind: str,
    judge: str,
    chat: bool | None,
    against: str | None = None,
) -> tuple[Path, Generation]:
    """Where the result goes, and how models are sampled."""
    from dualign import data
    from dualign.config import load
    from dualign.errors import UserError
    from dualign.eval import outputs
    from dualign.schema import DataConfig

    if prompts is None and (limit, max_new_tokens, temperature, k, chat) != (None, TOKENS, 0.0, 1, None):
        raise UserError(
            "--limit, --max-new-tokens, --temperature, --k and --chat say how to sample on --prompts; without it, what a "
            "run's own evaluations sampled is judged"
        )
    run = next((s for s in sources if outputs.is_run(s)), None)
    folder = Path(run) / "eval" if run else Path("eval")
    name = "-".join([kind, _slug(judge), *([_slug(prompts)] if prompts else [])])
    path = out or folder / f"{name}.json"
    chosen = None
    if prompts is not None:
        if chat is None:
            runs = [s for s in (*sources, *([against] if against else [])) if outputs.is_run(s)]
            asked = {load(Path(r) / "config.yaml").data.chat for r in runs}
            if len(asked) > 1:
                raise UserError("the runs differ in data.chat: say --chat or --no-chat, and all are asked alike")
            chat = any(asked)
        chosen = data.draw(data.load_prompts(prompts, DataConfig(train=prompts, chat=chat), "test"), limit)
    return path, outputs.Generation(chosen, max_new_tokens, temperature, k, seed, path.parent / "outputs")


def _slug(text: str) -> str:
    """A judge's spec as part of a file's name."""
    import hashlib
    import re

    name = re.sub(r"\W+", "-", Path(text).name.removeprefix("builtin:")).strip("-")
    return name if len(name) <= 40 else f"{name[:30]}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


@app.command()
def cheat(
    run: Annotated[Path, typer.Argument(help="a run's folder")],
    second: Annotated[
        str | None, typer.Option(help="an independent reward that was never trained on: " + JUDGE_HELP)
    ] = None,
    until: Annotated[int | None, typer.Option(min=1, help="as seen after so many online batches")] = None,
    out: Out = None,
) -> None:
    """Signs of overoptimisation, batch by batch, and a verdict in plain words."""
    from dualign.eval import cheat as cheating
    from dualign.eval import results, show

    path = out or run / "eval" / ("cheat.json" if until is None else f"cheat-until-{until}.json")
    spec = second or cheating.independent(run)
    with _judge(spec, [str(run)], path) as judge:
        table = cheating.trace(run, judge, until)
    result = results.provenance("cheat", {"name": judge.name, "settings": judge.settings}, 0)
    result |= {"second": spec, "until": until, "batches": table, **cheating.verdict(table)}
    results.write(path, result)
    show.cheat(result, path)


def report(
    runs: Annotated[list[Path], typer.Argument(help="runs' folders; several are laid over one another")],
    out: Annotated[Path | None, typer.Option(help="an .html file; default: RUN/report/index.html")] = None,
) -> None:
    """One self-contained page about runs, with PNG and CSV of every figure beside it."""
    from dualign.eval.report import write_report

    path = write_report(runs, out)
    print(f"{path} ({path.stat().st_size / 1e6:.1f} MB); figures as PNG and CSV in {path.parent / 'figures'}")
