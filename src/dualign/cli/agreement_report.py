"""One file's agreement numbers, as a record, a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dualign.annotate import agreement
from dualign.annotate.settings import HeadReward, JudgeReward, PreferenceReward
from dualign.cli.labelled import labelled_pairs
from dualign.common.errors import UserError, clean

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
    pairs, left_out = labelled_pairs(file, limit, prompt_column)
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


def print_report(reports: Sequence[Report]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for report in reports:
        table = Table("labeller", "pairs", "agrees", "95 %", "ties", "kappa", "absent", title=Path(report["file"]).name)
        for row in report["labellers"]:
            found = ["-"] * 4  # where no pair could be labelled there is nothing to say
            if row["pairs"] > 0:
                between = f"{100 * row['low']:.1f}-{100 * row['high']:.1f}"
                found = [f"{100 * row['share']:.1f} %", between, f"{100 * row['ties']:.1f} %", f"{row['kappa']:.3f}"]
            table.add_row(row["labeller"], f"{row['pairs']:,}", *found, f"{row['absent']:,}")
        console.print(table)
        for reason, count in report["left_out"].items():
            console.print(f"{count} of {report['rows']} pairs cannot be compared: {clean(reason)}", markup=False)
        orders = report["orders"]
        if orders and not orders["pairs"]:
            console.print("AI preference by order: no pair was answered in both")
        elif orders:
            console.print(
                f"AI preference by order: {100 * orders['preferred_first']:.1f} % where people's choice is first, "
                f"{100 * orders['preferred_second']:.1f} % where it is second; {100 * orders['first_named']:.1f} % of "
                f"answers name the first; {100 * orders['consistent']:.1f} % of {orders['pairs']:,} pairs alike in both"
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
