"""IFEval (Zhou et al. 2023, arXiv 2311.07911): instructions that a program can check, so that no judge is needed.

The checks are those of EleutherAI's lm-evaluation-harness (`pip install 'lm-eval[ifeval]'`), called as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dualign.common.errors import UserError
from dualign.common.intervals import bracket
from dualign.eval.outputs import Answer
from dualign.eval.result import Column, Json, Table
from dualign.eval.statistics import share

COLUMNS = ("instruction_id_list", "kwargs")
MISSING = "counting sentences needs NLTK's data: python -m nltk.downloader punkt punkt_tab"


def library() -> Any:
    """Raises UserError where it is not installed."""
    try:
        from lm_eval.tasks.ifeval import utils
    except ImportError as error:
        raise UserError(f"eval ifeval needs lm-evaluation-harness: pip install 'lm-eval[ifeval]' ({error})") from None
    return utils


def check(answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """Per answer: which of its instructions it follows, strictly and loosely (loosely: also without its first or last
    line, or asterisks). Both are None, with the reason, where a check could not be run. Raises UserError where no
    prompt has IFEval's columns."""
    checks = library()
    if not any(set(COLUMNS) <= set(answer.prompt.columns) for answer in answers):
        raise UserError(f"IFEval's columns {' and '.join(COLUMNS)} are in no row of the prompts")
    return [_one(checks, answer) for answer in answers]


def _one(checks: Any, answer: Answer) -> dict[str, Any]:
    given = {name: answer.prompt.columns.get(name) for name in COLUMNS}
    row = {"id": answer.prompt.id, "instructions": list(given["instruction_id_list"] or ())}
    missing = next((f"{name} is null or missing" for name, value in given.items() if value is None), None)
    if reason := answer.absent or missing:
        return row | {"strict": None, "loose": None, "reason": reason}
    doc = {"key": answer.prompt.id, "prompt": answer.prompt.text, **given}
    try:
        found = checks.process_results(doc, [answer.text])
    except LookupError:  # NLTK's sentence model, which the library fetches when it can
        return row | {"strict": None, "loose": None, "reason": MISSING}
    return row | {"strict": found["inst_level_strict_acc"], "loose": found["inst_level_loose_acc"], "reason": None}


def table(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The four accuracies, over prompts and over instructions, strict and loose. Unchecked answers are left out."""
    checked = [r for r in rows if r["strict"] is not None]
    result: dict[str, Any] = {"checked": len(checked), "absent": len(rows) - len(checked)}
    for kind in ("strict", "loose"):
        result[f"prompt_{kind}"] = share([float(all(r[kind])) for r in checked]).record()
        every = [ok for r in checked for ok in r[kind]]
        result[f"instruction_{kind}"] = sum(every) / len(every) if every else None
    result["absent_reasons"] = sorted({r["reason"] for r in rows if r["reason"]})[:3]
    result["headline"] = f"prompt-level strict accuracy {bracket(result['prompt_strict'], '{:.1%}')}"
    return result


SHOWN = [
    Column("accuracy"),
    Column("over prompts [95 %]", "{:.1%}", "{:.0%}"),
    Column("over instructions", "{:.1%}"),
]


def tables(record: Json) -> list[Table]:
    rows = [[kind, record[f"prompt_{kind}"], record[f"instruction_{kind}"]] for kind in ("strict", "loose")]
    notes = [f"{record['checked']} checked, {record['absent']} not", *record["absent_reasons"]]
    return [Table("IFEval", SHOWN, rows, notes, record.get("source"), run=record.get("run"))]
