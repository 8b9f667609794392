"""`dualign eval winrate | reward | cheat` for Python: `win_rate`, `mean_reward`, `cheating`.

Each writes its result beside the run and returns it; `path` is its file. A run that `dualign.train(reward=f)` gave its
reward to is judged by it with `reward=f`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualign.annotate import as_list
from dualign.annotate.batch import ahead
from dualign.annotate.function import RewardFunction, name_of
from dualign.common.errors import UserError
from dualign.eval import cheat, cost, outputs, rewards, store, winrate
from dualign.eval.asking import Asking, data_of, generation, said
from dualign.eval.bias import errors_of, read_errors
from dualign.eval.judges import Judges, judge_pairs, open_judge
from dualign.eval.outputs import Generation, Outputs
from dualign.eval.places import named, place, slug
from dualign.eval.result import Result
from dualign.run.folder import Run

Reward = RewardFunction | Sequence[RewardFunction]


def win_rate(
    sources: Sequence[str],
    judge: str = "run",
    against: str | None = None,
    asking: Asking | None = None,
    reward: Reward = (),
    out: Path | None = None,
    judge_errors: Path | None = None,
) -> Result:
    """Win rate of each source (runs, checkpoints, models, files of outputs) against each run's π_0, or `against`.
    `judge_errors`: what `dualign agreement --out` wrote of the judge: also the win rate that people would give."""
    asking = asking or Asking()
    known = read_errors(judge_errors) if judge_errors else None
    path = place("winrate", sources, judge, asking, out, against)
    functions = _functions(reward, sources, judge)
    how = generation([*sources, *([against] if against else [])], asking, path.parent / "outputs")
    systems: list[dict[str, Any]] = []
    rows, last = [], []
    with Judges(judge, sources, path.parent, functions) as judges:
        asked = []
        for source, judged in zip(sources, judges, strict=True):
            as_asked = replace(how, data=how.data or data_of(source) or data_of(against))  # for files of outputs
            sides = winrate.sides(source, _points(source, as_asked), _opponent(against, as_asked))
            asked.append((source, judged, *sides))
        ahead(lambda: [judge_pairs(judged, a, b) for _, judged, points, b in asked for a in points])
        for source, judged, points, b in asked:
            errors = errors_of(known, judged.settings, str(judge_errors)) if known is not None else None
            table, pairs = winrate.curve(judged, points, b, asking.seed, errors)
            systems.append({
                "source": source, "run": store.away(source, path), "judge": judged.record(),
                "against": {"source": against, "name": b.name}, "sampling": said(source, how, asking),
                "points": table, **cost.of_system(source, table[-1]),
            })  # fmt: skip
            rows += [winrate.row(p.name, pair) for p, found in zip(points, pairs, strict=True) for pair in found]
            last.append(pairs[-1])
        record = store.provenance("winrate", judges.record(), asking.seed)
        record |= {"prompts": len({pair.key for pair in last[0]}), "systems": systems}
        if len(sources) > 1 and judges.agree:
            record["seeds"] = winrate.across_seeds(last)
    return store.write(path, Result(rows, winrate.headline(record), winrate.tables(record), record))


def mean_reward(
    sources: Sequence[str],
    judge: str = "run",
    second: str | None = None,
    asking: Asking | None = None,
    reward: Reward = (),
    out: Path | None = None,
) -> Result:
    """Mean reward of each source, and with `second` whether the gain survives another judge."""
    asking = asking or Asking()
    path = place("reward", sources, judge, asking, out, second=second)
    functions = _functions(reward, sources, judge, second)
    how = generation(sources, asking, path.parent / "outputs")
    points = [_points(source, how) for source in sources]
    systems: list[dict[str, Any]] = [
        {"source": source, "run": store.away(source, path), "sampling": said(source, how, asking)} for source in sources
    ]
    values: list[list[rewards.Scored]] = []
    for name, spec in (("", judge), ("second_", second)):
        if spec is None:
            continue
        with Judges(spec, sources, path.parent, functions) as judges:
            ahead(lambda: [rewards.scored(judged, points[i]) for i, judged in enumerate(judges)])
            for i, judged in enumerate(judges):
                scored = rewards.scored(judged, points[i])
                systems[i] |= {f"{name}judge": judged.record(), f"{name}points": rewards.curve(points[i], scored)}
                if name:
                    systems[i]["swap"] = rewards.swap(points[i], values[i], scored)
                values.append(scored)
    named = {"judge": judge} | ({"second": second} if second else {})
    record = store.provenance("reward", named, asking.seed) | {"systems": systems}
    return store.write(path, Result((), rewards.headline(record), rewards.tables(record), record))


def cheating(
    run: Path, second: str | None = None, until: int | None = None, reward: Reward = (), out: Path | None = None
) -> Result:
    """Signs of overoptimisation, batch by batch, and a verdict in plain words."""
    stem = "-".join(["cheat", *([f"until-{until}"] if until else []), *([slug(second)] if second else [])])
    path = out or run / "eval" / f"{named(stem, [second], {})}.json"
    spec = second or cheat.independent(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open_judge(spec, str(run), path.parent, _functions(reward, [str(run)], spec)) as judge:
        table = cheat.trace(run, judge, until)
    record = store.provenance("cheat", judge.record(), 0) | {"source": str(run), "run": store.away(run, path)}
    record |= {"second": spec, "until": until, "batches": table, **cheat.verdict(table)}
    return store.write(path, Result((), record["verdict"], cheat.tables(record), record))


def _functions(reward: Reward, runs: Sequence[str], *judges: str | None) -> Sequence[RewardFunction]:
    """Raises UserError for a function that is nobody's own reward: it would be left out in silence."""
    functions: Sequence[RewardFunction] = as_list(reward)
    if functions and "run" not in judges:
        raise UserError("--function (in Python: reward=) is part of a run's own reward, but another judge is named")
    known = [names for run in runs if outputs.is_run(run) and (names := Run.open(Path(run)).functions) is not None]
    for function in functions if known else ():
        if not any(name_of(function) in names for names in known):
            had = ", ".join(dict.fromkeys(name for names in known for name in names)) or "none"
            raise UserError(f"--function {name_of(function)}: no run here was given it in Python; those given: {had}")
    return functions


def _points(source: str, how: Generation) -> list[Outputs]:
    return [point.checked(source) for point in outputs.points(source, how)]


def _opponent(against: str | None, how: Generation) -> Outputs | None:
    """What the sources are compared with, under its whole name."""
    if against is None:
        return None
    last = _points(against, how)[-1]
    return replace(last, name=f"{against}, {last.name}" if outputs.is_run(against) else against)
