"""The page itself: text and numbers escaped, figures inline, completions as inert JSON."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from dualign.common.intervals import FEW, bracket, known, plus_minus
from dualign.eval.outputs import PI_0
from dualign.eval.report.data import Json, RunData, heldout_kl_name
from dualign.eval.report.figures import Drawn
from dualign.eval.show import asked
from dualign.training.view import verdict


def render(runs: Sequence[RunData], figures: Sequence[Drawn]) -> str:
    script = _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=escape("dualign: " + ", ".join(run.name for run in runs)),
        css=_asset("page.css"),
        script=script,
        # only this script may run, whatever a completion says
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdicts="".join(
            f'<p class="verdict">{escape(line)}</p>' for run in runs for line in _verdicts(run, len(runs))
        ),
        summary=_table(*_summary(runs)),
        evaluations=_evaluations(runs),
        figures="".join(map(_figure, figures)),
        settings="".join(_settings(run) for run in runs),
        data=_inert([_browser(run) for run in runs]),
    )


def _asset(name: str) -> str:
    return (resources.files("dualign.eval.report") / name).read_text(encoding="utf-8")


def _inert(value: Any) -> str:
    """JSON that no HTML parser can leave: without <, no </script> and no comment can begin."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _browser(run: RunData) -> Json:
    return {"name": run.name, "batches": run.batches, "answers": run.answers, "batch_count": run.batch_count}


def _verdicts(run: RunData, runs: int) -> list[str]:
    """In words: did it get better, did it cheat."""
    lines = list(verdict(run.summary)) if "after" in run.summary else []
    for result in run.of_kind("cheat"):
        lines += [result["verdict"]]
    return [f"{run.name}: {line}" for line in lines] if runs > 1 else lines


def _summary(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    header = [
        "run",
        "system",
        "batches",
        "labels",
        "held-out reward",
        "gain in sd [95 %]",
        f"{heldout_kl_name(runs)}, nats",
        "length",
        "no EOS",
        "labels absent",
        "hours",
    ]
    rows = []
    for run in runs:
        s, held = run.summary, run.heldout
        first, last = (held[0], held[-1]) if held else ({}, {})
        hours = sum(sum(m["seconds"].values()) for m in run.metrics) / 3600
        labels = run.metrics[-1].get("labels", 0) if run.metrics else 0
        rows.append([
            run.name, str(s.get("algo", "unfinished")), str(len(run.metrics)), f"{labels:,}",
            _change(first, last, "reward", "{:+.2f}"),
            f"{plus_minus(s['gain_sd'], s['gain_sd_ci'], s.get('n'))}{_over(s)}" if "gain_sd" in s else "–",
            _number(last.get("kl"), "{:.2f}"), _change(first, last, "length", "{:.0f}"),
            _change(first, last, "missing_eos", "{:.0%}"), _change(first, last, "absent", "{:.0%}"), f"{hours:.2f}",
        ])  # fmt: skip
    return header, rows


def _over(summary: Json) -> str:
    """How many prompts a gain with an interval rests on; a run of before does not say."""
    return f", n={summary['n']}" if "n" in summary and known(summary["gain_sd_ci"]) else ""


def _change(first: Json, last: Json, key: str, form: str) -> str:
    if not (known(first.get(key)) and known(last.get(key))):
        return "–"
    return f"{form.format(first[key])} → {form.format(last[key])}"


def _number(value: float | None, form: str) -> str:
    return form.format(value) if value is not None and known(value) else "–"


def _evaluations(runs: Sequence[RunData]) -> str:
    """What `dualign eval` measured of these runs."""
    parts = []
    for title, header, rows in (*_winrates(runs), _rewards(runs), _benchmarks(runs)):
        if rows:
            parts.append(f'<h3>{escape(title)}</h3><div class="scroll">{_table(header, rows)}</div>')
    for run in runs:
        for result in run.of_kind("cheat"):
            signs = "".join(f"<li>{escape(sign)}</li>" for sign in result["signs"])
            title = f"Did it cheat? {run.name}, by {result['second']}"
            parts.append(f"<h3>{escape(title)}</h3><p>{escape(result['verdict'])}</p><ul>{signs}</ul>")
    inner = "".join(parts)
    heading = '<h2 id="h-eval">Evaluations</h2>'
    return f'<section aria-labelledby="h-eval">{heading}{inner}</section>' if inner else ""


def _winrates(runs: Sequence[RunData]) -> list[tuple[str, list[str], list[list[str]]]]:
    """A table for each opponent, π_0 first."""
    header = ["run", "judge", "labels", "win rate [95 %]", "prompts", "length-controlled [95 %]", "won / tied / lost",
              "both orders agree", "labels per point", "asked"]  # fmt: skip
    tables: dict[str, list[list[str]]] = {PI_0: []}
    for run in runs:
        for rate in run.winrates():
            p = rate.points[-1]
            above = 100 * (p["win_rate"]["value"] - 0.5) if p["win_rate"]["n"] >= FEW else 0.0
            tables.setdefault(rate.against, []).append([
                run.name, rate.judge, f"{p['labels']:,}", bracket(p["win_rate"], "{:.1%}"), str(p["win_rate"]["n"]),
                bracket(p["length_controlled"], "{:.1%}"), f"{p['won']} / {p['tied']} / {p['lost']}",
                _number(p["swap_consistency"], "{:.0%}"), f"{p['labels'] / above:.0f}" if above > 0 else "–",
                rate.asked,
            ])  # fmt: skip
    return [(f"Win rate against {against}, last policy", header, rows) for against, rows in tables.items()]


def _rewards(runs: Sequence[RunData]) -> tuple[str, list[str], list[list[str]]]:
    header = ["run", "judge", "gain in sd", "second judge", "gain in sd", "r of all answers", "gain survives", "asked"]
    rows = []
    for run in runs:
        for result in run.of_kind("reward"):
            system = result["system"]
            second, swap = system.get("second_points"), system.get("swap", {})
            rows.append([
                run.name, _judge(result, "judge"), _number(system["points"][-1]["gain_sd"], "{:+.2f}"),
                _judge(result, "second"), _number(second[-1]["gain_sd"], "{:+.2f}") if second else "–",
                _number(swap["all"]["pearson"], "{:.2f}") if swap else "–", swap.get("survives", "–"),
                asked(system),
            ])  # fmt: skip
    return "Reward on the evaluated answers, last policy against the first", header, rows


def _judge(result: Json, which: str) -> str:
    """What was said on the command line; for a run's own reward also its name."""
    spec = str(result["judge"].get(which, "–"))
    name = (result["system"].get({"judge": "judge", "second": "second_judge"}[which]) or {}).get("name")
    return f"run: {name}" if spec == "run" and name else spec


def _benchmarks(runs: Sequence[RunData]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for run in runs:
        for kind in ("mtbench", "alpaca", "ifeval"):
            rows += [[run.name, kind, str(r["headline"])] for r in run.of_kind(kind)]
    return "Benchmarks", ["run", "benchmark", "result"], rows


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figure(figure: Drawn) -> str:
    caption = f"{escape(figure.title)}<small>{escape(figure.about)}</small>"
    return f'<figure id="figure-{figure.name}"><figcaption>{caption}</figcaption>{figure.svg}</figure>'


def _settings(run: RunData) -> str:
    commands = "".join(f"<p><code>{escape(r['command'])}</code></p>" for r in run.results)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.config_text)}</pre>{commands}</details>"
