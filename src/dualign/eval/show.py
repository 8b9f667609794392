"""Results as tables for the terminal."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from dualign.common.errors import clean
from dualign.common.intervals import bracket, known, too_few
from dualign.training.heldout import kl_name


def _console() -> Console:
    """Wide enough for every table: a narrow terminal wraps lines, which reads better than columns of one word."""
    width = max(140, shutil.get_terminal_size().columns)
    return Console(highlight=False, markup=False, emoji=False, soft_wrap=True, width=width)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=None, pad_edge=False, header_style="bold", title_justify="left")
    for i, name in enumerate(columns):
        table.add_column(name, justify="right" if i else "left")
    return table


def percent(e: dict[str, Any]) -> str:
    return bracket(e, "{:.1%}", "{:.0%}")


def number(e: dict[str, Any]) -> str:
    return bracket(e, "{:+.3f}")


def winrate(result: dict[str, Any], path: Path) -> None:
    console = _console()
    for system in result["systems"]:
        judge = (system.get("judge") or result["judge"])["name"]
        title = f"{system['source']} against {system['points'][0]['b']}, judged by {judge}"
        table = _table(title, "policy", "labels", "win rate [95 %]", "length-controlled", "won/tied/lost", "absent",
                       "characters", "orders agree")  # fmt: skip
        for p in system["points"]:
            same = "-" if p["swap_consistency"] is None else f"{p['swap_consistency']:.0%}"
            table.add_row(clean(p["a"]), _or(p["labels"]), percent(p["win_rate"]), percent(p["length_controlled"]),
                          f"{p['won']}/{p['tied']}/{p['lost']}", str(p["absent"]),
                          f"{p['chars_a'] or 0:.0f}/{p['chars_b'] or 0:.0f}", same)  # fmt: skip
        console.print(table)
        if (last := system["points"][-1])["by_length"]:
            console.print(_lengths(last))
        else:
            console.print(f"no length control: {too_few(last['win_rate']['n'])}")
        if "cost" in system:
            console.print(Text(_cost(system)))
        console.print(Text(asked(system)))
    if len(result["systems"]) > 1 and "seeds" not in result:
        console.print("no mean over the sources: each is judged by its own reward, and they differ")
    if "seeds" in result:
        s = result["seeds"]
        console.print(f"mean of {len(result['systems'])} sources: {percent(s['over_seeds'])} between seeds, "
                      f"{percent(s['over_prompts'])} over prompts")  # fmt: skip
    console.print(f"in {path}, every verdict in {path.with_suffix('.jsonl').name}")


def _lengths(point: dict[str, Any]) -> Table:
    table = _table(
        f"{point['a']} by how many characters longer its answer is", "longer by", "win rate [95 %]", "prompts"
    )
    for row in point["by_length"]:
        table.add_row(f"{row['longer_from']:+d} .. {row['longer_to']:+d}", percent(row), str(row["n"]))
    return table


def _cost(system: dict[str, Any]) -> str:
    cost, each, n = system["cost"], system["cost_per_point"], system["points"][-1]["win_rate"]["n"]
    spent = f"{cost['labels']:,} labels, {cost['calls']:,} judge calls, {cost['tokens']:,} tokens"
    text = f"cost: {spent}, ${cost['dollars']:.2f}, {cost['hours']:.2f} h"
    if each is None:
        return f"{text}; no cost per point of win rate: {too_few(n)}"
    if each["labels"] is None:
        return f"{text}; the win rate is not above 50 %"
    price = f"{each['labels']:.0f} labels, {each['tokens']:.0f} tokens, ${each['dollars']:.4f}, {each['hours']:.3f} h"
    return f"{text}; for each point of win rate above 50 %: {price}"


def reward(result: dict[str, Any], path: Path) -> None:
    console = _console()
    for system in result["systems"]:
        for key, judge in (("points", "judge"), ("second_points", "second_judge")):
            if key not in system:
                continue
            own = "its own reward, " if result["judge"][judge.removesuffix("_judge")] == "run" else ""
            table = _table(f"{system['source']} under {own}{system[judge]['name']}", "policy", "labels",
                           "reward [95 %]", "gain over the first [95 %]", "in sd", "absent")  # fmt: skip
            for p in system[key]:
                sd = "-" if p["gain_sd"] is None else f"{p['gain_sd']:+.2f}"
                table.add_row(
                    clean(p["name"]), _or(p["labels"]), number(p["reward"]), number(p["gain"]), sd, str(p["absent"])
                )
            console.print(table)
        if "swap" in system:
            swap = system["swap"]
            words = ", ".join(f"{what} r {_r(swap[what])}" for what in ("all", "last", "gains"))
            console.print(f"judge swap: {words}")
            if "survives" in swap:
                console.print(f"does the gain survive the second judge? {swap['survives']}; "
                              f"{len(swap['disagreements'])} disagreements listed in the file")  # fmt: skip
        console.print(Text(asked(system)))
    console.print(f"in {path}")


def asked(system: dict[str, Any]) -> str:
    """How a system's answers came about, and by what exactly they were judged; "unknown" where an earlier version did not
    write it down."""
    how, judge = dict(system.get("sampling") or {}), system.get("judge") or {}
    words = [f"answers to {clean(str(how.pop('prompts')))}"] if how else ["how it was asked: unknown"]
    system_prompt = how.pop("system_prompt", None)
    words += [f"{key.replace('_', ' ')} {value}" for key, value in how.items() if value is not None]
    words += [f"system prompt {clean(system_prompt)!r}"] if system_prompt else []
    now = f", not surely what the run was trained on: {clean(judge['changed'])}" if judge.get("changed") else ""
    return f"{', '.join(words)}; reward {judge.get('digest') or 'unknown'}{now}"


def _r(c: dict[str, float]) -> str:
    return bracket(c | {"value": c["pearson"]}, "{:.2f}") if known(c["pearson"]) else f"– (n={c['n']})"


def cheat(result: dict[str, Any], path: Path) -> None:
    console = _console()
    kl = next((row["kl_name"] for row in result["batches"] if row.get("kl_name")), kl_name({}))
    table = _table(f"batch by batch; second reward: {result['second']}", "batch", "reward (sd)", "second (sd)", kl,
                   "no EOS", "length", "distinct-2", "repeats", "refusals", "same opening")  # fmt: skip
    for row in result["batches"]:
        table.add_row(str(row["batch"]), _signed(row["reward_sd"]), _signed(row["second_sd"]), _plain(row["kl"]),
                      f"{row['missing_eos']:.0%}", f"{row['length']:.0f}", f"{row['distinct_2']:.2f}",
                      f"{row['repetition']:.0%}", f"{row['refusals']:.0%}", f"{row['same_opening']:.0%}")  # fmt: skip
    console.print(table)
    for line in [result["verdict"], *result["signs"]]:
        console.print(Text(line))
    console.print(f"in {path}")


def mtbench(result: dict[str, Any], path: Path) -> None:
    console = _console()
    table = _table(f"MT-Bench: {result['source']}", "category", "turn 1", "turn 2", "both [95 %]", "questions")
    for name, row in result["rows"].items():
        both = row["both"]
        turns = (_plain(row[turn]["value"]) for turn in ("turn_1", "turn_2"))
        table.add_row(name, *turns, bracket(both, "{:.2f}"), str(both["n"]))
    console.print(table)
    console.print(f"{result['headline']}; {result['absent']} ratings absent; in {path}")


def ifeval(result: dict[str, Any], path: Path) -> None:
    console = _console()
    table = _table(f"IFEval: {result['source']}", "accuracy", "over prompts [95 %]", "over instructions")
    for kind in ("strict", "loose"):
        share = result[f"instruction_{kind}"]
        table.add_row(kind, percent(result[f"prompt_{kind}"]), "-" if share is None else f"{share:.1%}")
    console.print(table)
    console.print(f"{result['checked']} checked, {result['absent']} not; in {path}")
    for reason in result["absent_reasons"]:
        console.print(Text(clean(reason)))


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _plain(value: float | None) -> str:
    return "-" if value is None or value != value else f"{value:.2f}"


def _or(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
