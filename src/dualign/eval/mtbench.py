"""MT-Bench (Zheng et al. 2023, arXiv 2306.05685): 80 two-turn questions, each turn graded 1-10 by a judge.

FastChat's question file and judge prompts are read as they are, from where the user has them; single-answer grading,
answers greedy. Questions with a reference answer are graded against it, as FastChat does for math, reasoning, coding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dualign.annotate.client import Client
from dualign.annotate.endpoints import JudgeSampling
from dualign.annotate.judge import chat
from dualign.annotate.reply import read_reply
from dualign.annotate.request import Payload
from dualign.common.errors import UserError
from dualign.common.intervals import bracket
from dualign.common.types import Label, Message, Prompt, user_prompt
from dualign.eval.outputs import Answer, Generation, generate
from dualign.eval.result import Column, Json, Table
from dualign.eval.statistics import t_interval
from dualign.models.settings import ModelConfig

NEED_REFERENCE = ("math", "reasoning", "coding")
# (has reference, turn) -> the name of FastChat's prompt
PROMPTS = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}


@dataclass(frozen=True)
class Question:
    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, ...] | None


def load_questions(path: Path) -> list[Question]:
    """FastChat's question.jsonl. Raises UserError naming the row."""
    found = []
    for number, row in _rows(path):
        try:
            reference = tuple(row["reference"]) if row.get("reference") else None
            turns = (row["turns"][0], row["turns"][1])
            found.append(Question(str(row["question_id"]), row["category"], turns, reference))
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}, row {number}: expected question_id, category and two turns ({error!r})") from None
        if row["category"] in NEED_REFERENCE and (reference is None or len(reference) < 2):
            raise UserError(f"{path}, row {number}: {row['category']} is graded against references, and it has not two")
    return found


def load_prompts(path: Path) -> dict[str, dict[str, str]]:
    """FastChat's judge_prompts.jsonl, by name. Raises UserError where one of the four is missing."""
    prompts = {str(row.get("name")): row for _, row in _rows(path)}
    for name in PROMPTS.values():
        if not {"system_prompt", "prompt_template"} <= set(prompts.get(name, ())):
            raise UserError(f"{path}: no judge prompt {name} with system_prompt and prompt_template")
    return prompts


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [(i, json.loads(line)) for i, line in enumerate(lines, 1) if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON Lines: {error}") from None


def answer(model: ModelConfig, questions: Sequence[Question], how: Generation) -> list[tuple[Answer, Answer]]:
    """Both turns' answers; the second prompt holds the first answer. A second turn that does not fit into the model's
    context is absent, and so is one after an absent first."""
    system = how.data.system_prompt if how.data else None
    greedy = replace(how, temperature=0.0, k=1)
    first = generate(model, replace(greedy, prompts=[user_prompt(q.id, q.turns[0], system) for q in questions]))
    prompts = [
        Prompt(q.id, (*a.prompt.messages, {"role": "assistant", "content": a.text},
                      {"role": "user", "content": q.turns[1]}))
        for q, a in zip(questions, first, strict=True) if not a.absent
    ]  # fmt: skip
    if not prompts:
        raise UserError(f"{model.name}: none of the {len(first)} questions can be asked: {first[0].absent}")
    second = iter(generate(model, replace(greedy, prompts=prompts)))
    none = "there is no first answer"
    return [(a, replace(a, absent=f"{none}: {a.absent}") if a.absent else next(second)) for a in first]


def messages(
    prompts: Mapping[str, Mapping[str, str]], question: Question, answers: tuple[str, str], turn: int
) -> tuple[str, list[Message]]:
    """(name of the prompt, what the judge is asked about a turn)."""
    name = PROMPTS[question.category in NEED_REFERENCE, turn]
    values = {"question": question.turns[0], "answer": answers[0]}
    for i in (1, 2):
        values |= {f"question_{i}": question.turns[i - 1], f"answer_{i}": answers[i - 1]}
        if question.reference:
            values[f"ref_answer_{i}"] = question.reference[i - 1]
    # one pass: an answer that holds {question} stays as it is
    text = re.sub(r"\{(\w+)\}", lambda m: values.get(m[1], m[0]), prompts[name]["prompt_template"])
    system = {"role": "system", "content": prompts[name]["system_prompt"]}
    return name, [system, {"role": "user", "content": text}]


def read_rating(payload: Payload) -> Label:
    """FastChat's rule: [[rating]], else [rating]. Anything else, or a number outside 1-10, is absent (never -1)."""
    reply = read_reply(payload)
    text = reply.text
    found = re.search(r"\[\[(\d+\.?\d*)\]\]", text) or re.search(r"\[(\d+\.?\d*)\]", text)
    if not found:
        return Label.absent("no [[rating]] in the reply", note=reply.note)
    value = float(found[1])
    return (
        Label(value, note=reply.note) if 1 <= value <= 10 else Label.absent(f"a rating of {value:g}", note=reply.note)
    )


def grade(
    client: Client,
    settings: JudgeSampling,
    prompts: Mapping[str, Mapping[str, str]],
    questions: Sequence[Question],
    answers: Sequence[tuple[Answer, Answer]],
) -> list[tuple[Label, Label]]:
    """Ratings of both turns of each question, all asked side by side. An absent answer has an absent rating."""

    def ask(question: Question, answers: tuple[Answer, Answer], turn: int) -> Future[Label]:
        if reason := answers[turn - 1].absent:
            absent: Future[Label] = Future()
            absent.set_result(Label.absent(reason))
            return absent
        name, asked = messages(prompts, question, (answers[0].text, answers[1].text), turn)
        return client.submit(chat(settings, asked, f"mt-bench {name}"), read_rating)

    futures = [[ask(q, a, turn) for turn in (1, 2)] for q, a in zip(questions, answers, strict=True)]
    return [(first.result(), second.result()) for first, second in futures]


def table(questions: Sequence[Question], ratings: Sequence[tuple[Label, Label]]) -> dict[str, Any]:
    """Mean rating by category and turn, and over all, with intervals over questions (ICLR Table 4's columns)."""

    def mean(rows: Sequence[tuple[Label, Label]], turns: Sequence[int]) -> dict[str, Any]:
        per_question = [[row[t].value for t in turns if row[t].value is not None] for row in rows]
        return t_interval([sum(v) / len(v) for v in per_question if v]).record()  # type: ignore[arg-type]

    groups = {c: [r for q, r in zip(questions, ratings, strict=True) if q.category == c]
              for c in dict.fromkeys(q.category for q in questions)}  # fmt: skip
    rows = {
        name: {"turn_1": mean(group, [0]), "turn_2": mean(group, [1]), "both": mean(group, [0, 1])}
        for name, group in {"all": list(ratings), **groups}.items()
    }
    reasons = [label.reason or "absent" for pair in ratings for label in pair if label.value is None]
    overall = rows["all"]["both"]
    headline = "no rating in any reply of the judge"
    if overall["n"]:
        headline = f"{bracket(overall, '{:.2f}')} of 10"
    return {"rows": rows, "absent": len(reasons), "absent_reasons": sorted(set(reasons))[:5], "headline": headline}


COLUMNS = [Column("category"), Column("turn 1", "{:.2f}"), Column("turn 2", "{:.2f}"), Column("both [95 %]", "{:.2f}"),
           Column("questions")]  # fmt: skip


def tables(record: Json) -> list[Table]:
    rows = [
        [name, row["turn_1"]["value"], row["turn_2"]["value"], row["both"], row["both"]["n"]]
        for name, row in record["rows"].items()
    ]
    notes = [f"{record['absent']} ratings absent", *record.get("absent_reasons", ())]
    about = {"judge": str((record.get("judge") or {}).get("model", "unknown"))}
    return [Table("MT-Bench", COLUMNS, rows, notes, record.get("source"), about, run=record.get("run"))]
