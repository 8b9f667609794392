"""How well labellers agree with people on files of pairs: records, tables and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dualign.annotate import agreement
from dualign.annotate.endpoints import JudgeReward, PreferenceReward
from dualign.annotate.labelled import load_pairs
from dualign.annotate.settings import HeadReward
from dualign.common.errors import UserError
from dualign.eval.result import Column, Result, Table

Report = dict[str, Any]


def measure_file(
    file: str,
    limit: int | None,
    heads: Sequence[str],
    judge: JudgeReward | None,
    preference: PreferenceReward | None,
    prompt_column: str = "prompt",
) -> Report:
    """{"file", "rows", "labellers": [Agreement ...], "orders": Orders | None, "left_out": why some pairs cannot be
    compared, with how many} as plain values. Those pairs count as absent for every labeller."""
    pairs, left_out = load_pairs(file, limit, prompt_column)
    found = [agreement.measure("longer answer", pairs, agreement.longer(pairs))]
    if ceiling := agreement.human_ceiling(pairs):
        found.append(ceiling)
    for path in heads:
        from dualign.annotate.head import HeadAnnotator

        scores = agreement.score_pairs(HeadAnnotator(HeadReward(path=path)), pairs)
        found.append(agreement.measure(f"head {Path(path).stem}", pairs, scores))
    orders = None
    if judge and preference:
        found.append(agreement.measure(f"AI reward ({judge.model})", pairs, _rewards(judge, pairs)))
        verdicts = _verdicts(preference, pairs)
        values = [None if v.value is None else v.value - 0.5 for v in verdicts]
        found.append(agreement.measure(f"AI preference ({judge.model})", pairs, values))
        orders = asdict(agreement.by_order(pairs, verdicts))
    missing = left_out.total()
    labellers = [asdict(replace(f, absent=f.absent + missing)) for f in found]
    return {"file": file, "rows": len(pairs) + missing, "labellers": labellers, "orders": orders,
            "left_out": dict(left_out)}  # fmt: skip


def _rewards(settings: JudgeReward, pairs: Sequence[agreement.Pair]) -> list[float | None]:
    from dualign.annotate.judge import JudgeAnnotator

    judge = JudgeAnnotator(settings)
    try:
        return agreement.score_pairs(judge, pairs)
    finally:
        judge.close()


def _verdicts(settings: PreferenceReward, pairs: Sequence[agreement.Pair]) -> list[agreement.Verdict]:
    from dualign.annotate.judge import windowed
    from dualign.annotate.preference import PreferenceAnnotator

    judge = PreferenceAnnotator(settings)
    asked = windowed(pairs, lambda p: judge.compare(p.prompt, p.a, p.b), 2 * settings.concurrency)
    try:
        return [pair.verdict() for _, pair in asked]
    finally:
        judge.close()


COLUMNS = [
    Column("labeller"), Column("pairs"), Column("agrees [95 %]", "{:.1%}"), Column("ties", "{:.1%}"),
    Column("kappa", "{:.3f}"), Column("absent"),
]  # fmt: skip


def result(reports: Sequence[Report]) -> Result:
    """A table for each file. Where no pair could be labelled there is nothing to say."""
    tables = []
    for report in reports:
        rows = [
            [r["labeller"], r["pairs"], *([r | {"value": r["share"]}, r["ties"], r["kappa"]] if r["pairs"] else [None] * 3),
             r["absent"]]
            for r in report["labellers"]
        ]  # fmt: skip
        left_out = [f"{count} of {report['rows']} pairs cannot be compared: {reason}"
                    for reason, count in report["left_out"].items()]  # fmt: skip
        notes = [*left_out, *([_by_order(report["orders"])] if report["orders"] else [])]
        tables.append(Table(Path(report["file"]).name, COLUMNS, rows, notes))
    return Result((), "", tables)


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
