"""verify, replay, what-if, witness: what a run's folder tells, without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dualign.cli.printed import AsJson, document, note

if TYPE_CHECKING:
    from dualign.run.replay import Effect

RunFolder = Annotated[Path, typer.Argument(help="the run's folder")]


def register(app: typer.Typer) -> None:
    app.command()(verify)
    app.command()(replay)
    app.command("what-if")(what_if)
    app.command()(witness)


def verify(
    run: RunFolder,
    as_json: AsJson = False,
) -> None:
    """Check a run's files, and what it was made from, against their recorded hashes, and its batches against its metrics.
    Exit code 1: damaged or changed."""
    from dualign.run.verify import verify as check

    findings = check(run)
    for finding in findings if not as_json else ():
        print(f"{finding.kind}: {finding.text}\n  {finding.remedy}")
    if as_json:
        document([vars(finding) for finding in findings])
    if any(finding.kind != "unfinished" for finding in findings):
        raise typer.Exit(1)
    if not as_json:
        print(f"{run}: every file is what was written" + ("; the run is not finished" if findings else ""))


def replay(run: RunFolder, as_json: AsJson = False) -> None:
    """Compute advantages and weights again from the stored batches, and compare. Exit code 1: different."""
    from dualign.config import load
    from dualign.run import replay as stored
    from dualign.run.folder import Run

    opened = Run.open(run)
    algo = load(opened.config_file).algo
    every = []
    for b in stored.stored(opened, uses=True):
        found = stored.replay(b, algo)
        every.append({"batch": found.step, "used_in": b.used_in, "rows": len(b.tokens), "verdict": found.verdict,
                      "where": found.where, "difference": found.difference})  # fmt: skip
        if as_json:
            continue
        more = (
            "" if found.difference == 0 else f": {found.where} by {found.difference:.1e}, relative to its largest value"
        )
        again = "" if b.used_in is None else f" again in {b.used_in}"
        print(f"batch {found.step:4d}{again}  {len(b.tokens)} rows  {found.verdict}{more}")
    if as_json:
        document(every)
    if different := sum(each["verdict"] == "different" for each in every):
        note(f"{different} batches do not hold what {algo.name} makes of their rewards and log-probs")
        raise typer.Exit(1)


def what_if(
    run: RunFolder,
    settings: Annotated[list[str], typer.Argument(help="of the algorithm, for example alpha=0.5 beta=0.1 w_clip=50")],
    gradients: Annotated[
        bool, typer.Option("--gradients", help="also the cosine of true gradients, at every checkpoint that is kept")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """What other settings of the algorithm would have made of the stored batches. No model, no label."""
    from dualign.run import replay as stored
    from dualign.run.folder import Run

    opened = Run.open(run)
    config, other = stored.changed(opened, settings)
    batches = list(stored.stored(opened))
    effects = [stored.what_if(b, config.algo, other.algo) for b in batches]
    for line in _effects(effects, settings) if not as_json else ():
        print(line)
    cosines = {}
    if gradients:
        models = {0: Path(config.model.name)} | {int(p.name): p for p in opened.saved() if "+" not in p.name}
        for b in batches:
            if b.step in models:
                found = cosines[b.step] = stored.gradient_cosine(str(models[b.step]), config, b, other.algo)
                if not as_json:
                    print(f"batch {b.step:4d}  cosine of the gradients of {models[b.step]}: {found:+.4f}")
    if as_json:
        document({"settings": settings, **stored.record(effects), "gradients": cosines})


def witness(
    run: RunFolder,
    more: Annotated[
        list[str] | None,
        typer.Option("--set", help="key=value of the reward that is asked; default: the run's own witness"),
    ] = None,
    every: Annotated[int, typer.Option(min=1, help="ask about each so many online batches")] = 4,
    sample: Annotated[int, typer.Option(min=1, help="completions of such a batch; four times as many of π_0's")] = 16,
    heldout: Annotated[int, typer.Option(min=0, help="held-out answers of each evaluation")] = 64,
    alpha: Annotated[float, typer.Option(help="the chance of a false alarm over the run")] = 0.05,
    name: Annotated[str | None, typer.Option(help="its folder, RUN/witness-NAME; default: the reward's name")] = None,
    as_json: AsJson = False,
) -> None:
    """Ask a second reward or judge about the stored batches and evaluations of a run: when did the two part?"""
    from dualign.eval.witness import ask

    settings = {"every": every, "sample": sample, "heldout": heldout, "alpha": alpha}
    found = ask(run, more or [], settings, name, note if as_json else print)
    if as_json:
        document(found)


def _effects(effects: Sequence[Effect], settings: Sequence[str]) -> Iterator[str]:
    """A line per batch, one for the run, and how the weights are spread."""
    from dualign.run.replay import EDGES, record

    yield f"stored -> with {' '.join(settings)}"
    for e in effects:
        yield f"batch {e.step:4d}  {_shares([e])}  direction {e.cosine:+.4f}"
    told = record(effects)
    yield f"run         {_shares(effects)}  direction {told['direction']:+.4f}"
    bounds = [f"<{high:.2%}" for high in EDGES[1:]] + ["largest"]
    yield f"rows by weight, as a share of their batch's largest ({', '.join(bounds)}):"
    for name, shares in (("stored ", told["weights"]["stored"]), ("what if", told["weights"]["what_if"])):
        yield f"  {name} |{_sparkline(shares)}|  " + "  ".join(f"{share:.0%}" for share in shares)
    yield (
        "direction: the cosine between the two losses' derivatives by log π(token), at π_θ = π_t, over all completion "
        "tokens;\n  that of the gradients themselves where those of different tokens are orthogonal and equally long "
        "(--gradients computes them)"
    )


def _shares(effects: Sequence[Effect]) -> str:
    """Mean over batches of each share that either setting has, before and after."""

    def mean(stats: Sequence[dict[str, float]], key: str) -> str:
        found = [s[key] for s in stats if key in s]
        return f"{sum(found) / len(found):4.0%}" if found else "   -"

    names = {"clip_rate": "clipped", "ess": "ESS", "tied": "tied", "no_signal": "tied groups"}
    before, after = [e.stats for e in effects], [e.other_stats for e in effects]
    shown = [key for key in names if any(key in stats for stats in (*before, *after))]
    return "  ".join(f"{names[key]} {mean(before, key)} ->{mean(after, key)}" for key in shown)


def _sparkline(shares: Sequence[float]) -> str:
    bars = " ▁▂▃▄▅▆▇█"
    return "".join(bars[math.ceil(share / max(*shares, 1e-9) * (len(bars) - 1))] for share in shares)
