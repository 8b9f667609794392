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

from dualign.common.intervals import known, plus_minus
from dualign.eval.report.data import Json, RunData, heldout_kl_name
from dualign.eval.report.figures import Drawn
from dualign.eval.report.tables import evaluations, html
from dualign.run.folder import Run
from dualign.training.view import verdict
from dualign.training.witness import verdict as witness_verdict


def render(runs: Sequence[RunData], figures: Sequence[Drawn]) -> str:
    script = _asset("parts.js").replace("export ", "") + _asset("page.js")
    return Template(_asset("page.html")).substitute(
        title=escape("dualign: " + ", ".join(run.name for run in runs)),
        css=_asset("parts.css") + _asset("page.css"),
        script=script,
        # only this script may run, whatever a completion says
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        verdicts="".join(
            f'<p class="verdict">{escape(line)}</p>' for run in runs for line in _verdicts(run, len(runs))
        ),
        summary=html(*_summary(runs)),
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
    lines = [*(verdict(run.summary) if "after" in run.summary else ()), *run.headlines]
    lines += [line for each in run.witnesses for line in witness_verdict(each, Run(run.folder))]
    return [f"{run.name}: {line}" for line in lines] if runs > 1 else lines


def _summary(runs: Sequence[RunData]) -> tuple[list[str], list[list[str]]]:
    header = [
        "run",
        "system",
        "batches",
        "labels",
        "held-out reward",
        "gain in sd [95 %]",
        f"{heldout_kl_name(runs)}, nats [95 %]",
        "length",
        "truncated",
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
            plus_minus(last.get("kl"), last.get("kl_ci"), last.get("prompts"), "{:.2f}"),
            _change(first, last, "length", "{:.0f}"),
            _change(first, last, "truncated", "{:.0%}"), _change(first, last, "absent", "{:.0%}"), f"{hours:.2f}",
        ])  # fmt: skip
    return header, rows


def _over(summary: Json) -> str:
    """How many prompts a gain with an interval rests on; a run of before does not say."""
    return f", n={summary['n']}" if "n" in summary and known(summary["gain_sd_ci"]) else ""


def _change(first: Json, last: Json, key: str, form: str) -> str:
    if not (known(first.get(key)) and known(last.get(key))):
        return "–"
    return f"{form.format(first[key])} → {form.format(last[key])}"


def _evaluations(runs: Sequence[RunData]) -> str:
    """What `dualign eval` measured of these runs."""
    inner = evaluations(runs)
    heading = '<h2 id="h-eval">Evaluations</h2>'
    return f'<section aria-labelledby="h-eval">{heading}{inner}</section>' if inner else ""


def _figure(figure: Drawn) -> str:
    caption = f"{escape(figure.title)}<small>{escape(figure.about)}</small>"
    return f'<figure id="figure-{figure.name}"><figcaption>{caption}</figcaption>{figure.svg}</figure>'


def _settings(run: RunData) -> str:
    commands = "".join(f"<p><code>{escape(r.record['command'])}</code></p>" for r in run.results)
    return f"<details><summary>{escape(run.name)}</summary><pre>{escape(run.config_text)}</pre>{commands}</details>"
