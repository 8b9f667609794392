"""How well labellers agree with people on files of pairs: records, tables, verdicts, a plot and a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dualign.annotate import agreement
from dualign.annotate.base import Annotator
from dualign.annotate.endpoints import JudgeReward, PreferenceReward
from dualign.annotate.judge_sets import Choice
from dualign.annotate.labelled import load_choices, load_pairs
from dualign.annotate.settings import HeadReward
from dualign.annotate.told import say_absent
from dualign.common.errors import UserError
from dualign.common.types import Label
from dualign.eval import best_of, bias
from dualign.eval.bias import Values
from dualign.eval.judge_verdict import verdict
from dualign.eval.result import Cell, Column, Result, Table

Report = dict[str, Any]
LONGER = "longer answer"


@dataclass(frozen=True)
class Labelled:
    """What one labeller said of a file: of its pairs, and of RewardBench 2's rows how far it was right (`credits`)."""

    name: str
    values: Values
    judge: JudgeReward | PreferenceReward | None = None
    verdicts: Sequence[agreement.Verdict] = ()
    credits: Sequence[float | None] = ()


def measure_file(
    file: str,
    limit: int | None,
    heads: Sequence[str],
    judge: JudgeReward | None,
    preference: PreferenceReward | None,
    prompt_column: str = "prompt",
) -> Report:
    """{"file", "rows", "labellers": [Agreement and biases ...], "orders": Orders | None, "best_of": RewardBench 2's
    accuracies, "verdict": lines, "left_out": why some pairs cannot be compared, with how many} as plain values. Those
    pairs count as absent for every labeller."""
    left_out: Counter[str] = Counter()
    choices = load_choices(file, limit)
    if choices is None:
        pairs, left_out = load_pairs(file, limit, prompt_column)
    else:
        pairs = [row.pair for row in choices if row.pair]
    found = list(_labelled(pairs, choices, heads, judge, preference))
    rule, by_length = bias.length_rule(pairs)
    records = [_record(each, pairs, by_length) | {"rule": rule} for each in found]
    if ceiling := agreement.human_ceiling(pairs):
        person = asdict(ceiling) | {"alpha": bias.people_alpha(pairs).record()}
        records.insert(1, person)
    missing = left_out.total()
    for record in records:
        record["absent"] += missing
    asked = next((each for each in found if each.verdicts), None)
    best = [best_of.summary(each.name, choices, each.credits) for each in found] if choices else []
    report: Report = {"file": file, "rows": len(choices or pairs) + missing, "labellers": records,
              "orders": asdict(agreement.by_order(pairs, asked.verdicts)) if asked else None,
              "best_of": best, "left_out": dict(left_out)}  # fmt: skip
    return report | {"verdict": [line for record in records for line in verdict(record, report["rows"])]}


def _labelled(
    pairs: Sequence[agreement.Pair],
    choices: Sequence[Choice] | None,
    heads: Sequence[str],
    judge: JudgeReward | None,
    preference: PreferenceReward | None,
) -> Iterator[Labelled]:
    yield Labelled(LONGER, agreement.longer(pairs), credits=_credits(choices, best_of.longest(choices or ())))
    for path in heads:
        from dualign.annotate.head import HeadAnnotator

        yield _scored(f"head {Path(path).stem}", HeadAnnotator(HeadReward(path=path)), pairs, choices)
    if judge:
        from dualign.annotate.judge import JudgeAnnotator

        annotator = JudgeAnnotator(judge)
        try:
            yield replace(_scored(f"AI reward ({judge.model})", annotator, pairs, choices), judge=judge)
        finally:
            annotator.close()
    if preference:
        yield _preferred(preference, pairs, choices)


def _scored(
    name: str, annotator: Annotator, pairs: Sequence[agreement.Pair], choices: Sequence[Choice] | None
) -> Labelled:
    if choices is None:
        return Labelled(name, agreement.score_pairs(annotator, pairs))
    scores = best_of.score(annotator, choices)
    ends = [(each[0], each[1]) for row, each in zip(choices, scores, strict=True) if row.pair]
    values = [None if a is None or b is None else a - b for a, b in ends]
    return Labelled(name, values, credits=_credits(choices, scores))


def _credits(choices: Sequence[Choice] | None, scores: Sequence[best_of.Scores]) -> list[float | None]:
    return [best_of.credit(row, each) for row, each in zip(choices or (), scores, strict=True)]


def _preferred(
    settings: PreferenceReward, pairs: Sequence[agreement.Pair], choices: Sequence[Choice] | None
) -> Labelled:
    """Of RewardBench 2, the right answer meets every wrong one; rows with several right ones are not asked."""
    rows = [row for row in choices or () if row.pair]
    others = [replace(row.pair, b=text) for row in rows if row.pair for text in row.wrong[1:]]
    verdicts = _verdicts(settings, [*pairs, *others])
    first, rest = verdicts[: len(pairs)], iter(verdicts[len(pairs) :])
    values = [None if v.value is None else v.value - 0.5 for v in first]
    met = {row.id: [v.value, *(next(rest).value for _ in row.wrong[1:])] for row, v in zip(rows, first, strict=False)}
    credits = [best_of.preferred(met[row.id]) if row.id in met else None for row in choices or ()]
    return Labelled(f"AI preference ({settings.model})", values, settings, first, credits)


def _verdicts(settings: PreferenceReward, pairs: Sequence[agreement.Pair]) -> list[agreement.Verdict]:
    from dualign.annotate.judge import windowed
    from dualign.annotate.preference import PreferenceAnnotator

    judge = PreferenceAnnotator(settings)
    asked = windowed(pairs, lambda p: judge.compare(p.prompt, p.a, p.b), 2 * settings.concurrency)
    try:
        verdicts = [pair.verdict() for _, pair in asked]
        say_absent(f"{judge.name} (preference)", [Label(v.value, v.reason, note=v.note) for v in verdicts])
        return verdicts
    finally:
        judge.close()


def _record(each: Labelled, pairs: Sequence[agreement.Pair], by_length: Values) -> Report:
    """A labeller's agreement, what it confuses, and its biases; None where there are no pairs to say it of."""
    found = asdict(agreement.measure(each.name, pairs, each.values))
    found |= {
        "alpha": bias.nominal_alpha(pairs, each.values).record(),
        "confusion": bias.confusion(pairs, each.values),
        "over_length": None, "length_bias": None, "own_bias": None, "named_first": None,
    }  # fmt: skip
    if each.name != LONGER:
        found["over_length"] = bias.over(pairs, each.values, by_length).record()
        found["length_bias"] = bias.length(pairs, each.values).record()
    if each.judge:
        found["rubric"] = each.judge.rubric
        found["own_bias"] = bias.own(pairs, each.values, each.judge.model).record()
    if each.verdicts:
        found["named_first"] = bias.position(each.verdicts).record()
    return found


COLUMNS = [
    Column("labeller"), Column("pairs"), Column("agrees [95 %]", "{:.1%}"), Column("ties", "{:.1%}"),
    Column("kappa", "{:.3f}"), Column("alpha [95 %]", "{:.3f}", "{:.2f}"), Column("absent"),
]  # fmt: skip
BIASES = [
    Column("labeller"), Column("over length alone [95 %]", "{:+.1%}"), Column("names the first [95 %]", "{:.1%}"),
    Column("length bias [95 %]", "{:+.1%}"), Column("bias to its own [95 %]", "{:+.1%}"),
]  # fmt: skip
CONFUSED = [
    Column("labeller"), Column("people say"), *(Column(f"it says {side}") for side in ("a", "b", "tie", "absent")),
]  # fmt: skip


def result(reports: Sequence[Report]) -> Result:
    """Tables for each file. Where no pair could be labelled there is nothing to say."""
    tables = [table for report in reports for table in _tables(report)]
    lines = [f"{Path(r['file']).name}: {line}" if len(reports) > 1 else line for r in reports for line in r["verdict"]]
    return Result((), "\n".join(lines), tables)


def _tables(report: Report) -> Iterator[Table]:
    name, labellers = Path(report["file"]).name, report["labellers"]
    rows: list[list[Cell]] = [
        [r["labeller"], r["pairs"],
         *([r | {"value": r["share"]}, r["ties"], r["kappa"], r["alpha"]] if r["pairs"] else [None] * 4), r["absent"]]
        for r in labellers
    ]  # fmt: skip
    left_out = [f"{count} of {report['rows']} pairs cannot be compared: {reason}"
                for reason, count in report["left_out"].items()]  # fmt: skip
    yield Table(name, COLUMNS, rows, [*left_out, *([_by_order(report["orders"])] if report["orders"] else [])])
    judged = [r for r in labellers if r.get("over_length")]
    keys = ("over_length", "named_first", "length_bias", "own_bias")
    if judged:
        yield Table(
            f"{name}: beside people's own preferences", BIASES, [[r["labeller"], *(r[k] for k in keys)] for r in judged]
        )
    met = [
        [r["labeller"], human, *said.values()]
        for r in judged
        for human, said in r["confusion"].items()
        if any(said.values())
    ]
    if met:
        yield Table(f"{name}: what people say, and what it says", CONFUSED, met)
    if report["best_of"]:
        yield best_of.table(name, report["best_of"])


def _by_order(orders: Report) -> str:
    if not orders["pairs"]:
        return "AI preference by order: no pair was answered in both"
    return (
        f"AI preference by order: {orders['preferred_first']:.1%} where people's choice is first, "
        f"{orders['preferred_second']:.1%} where it is second; {orders['first_named']:.1%} of answers name the first; "
        f"{orders['consistent']:.1%} of {orders['pairs']:,} pairs alike in both"
    )


def write_plot(reports: Sequence[Report], path: Path) -> None:
    """Shares with their intervals, a panel per file. Raises UserError where matplotlib is absent."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("--plot needs matplotlib: pip install 'dualign[plots]'") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    longest = max(len(report["labellers"]) for report in reports)
    size = (4.5 * len(reports) + 2, 1 + 0.5 * longest)
    figure, axes = plt.subplots(1, len(reports), squeeze=False, figsize=size, layout="constrained")
    for axis, report in zip(axes[0], reports, strict=True):
        rows = report["labellers"]
        shares, low, high = ([100 * row[key] for row in rows] for key in ("share", "low", "high"))
        below, above = ([abs(s - x) for s, x in zip(shares, ends, strict=True)] for ends in (low, high))
        axis.barh([row["labeller"] for row in rows], shares, xerr=[below, above], color="0.75", capsize=3)
        axis.axvline(50, color="0.3", linestyle=":", linewidth=1)
        axis.set(xlim=(0, 100), xlabel="agreement with people, %", title=Path(report["file"]).name)
        axis.invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
