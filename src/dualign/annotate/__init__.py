"""What labels completions. `build` turns a run's reward settings into one annotator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualign.annotate.base import Annotator
from dualign.annotate.combined import CombinedAnnotator, Term
from dualign.annotate.remembered import Memory, Remembered
from dualign.annotate.settings import (
    ClassifierReward,
    FunctionReward,
    HeadReward,
    JudgeReward,
    PreferenceReward,
    RewardConfig,
    ServedReward,
)
from dualign.annotate.together import Together
from dualign.common.errors import UserError
from dualign.common.processes import Processes

__all__ = ["build"]


def build(
    rewards: Sequence[RewardConfig],
    functions: Sequence[Callable[..., Any]] = (),
    run_dir: Path | None = None,
    memory: Memory | None = None,
    processes: Processes | None = None,
) -> Annotator:
    """The annotator of `rewards` and of further Python `functions` (weight 1): their weighted sum, or a single one as
    it is. What paid annotators buy is recorded under `run_dir`; what `memory` holds is not asked for. Where there are
    several `processes`, Python functions label the completions of all in one call. Raises UserError for what cannot be
    loaded."""
    from dualign.annotate.function import FunctionAnnotator

    terms = [
        Term("", _one(settings, run_dir), settings.weight, settings.optional, settings.where, settings.clip)
        for settings in rewards
    ]
    terms += [Term("", FunctionAnnotator(function)) for function in functions]
    if not terms:
        raise UserError("no reward: give the run a `reward` section, or train(..., reward=function)")
    whole = [isinstance(term.annotator, FunctionAnnotator) for term in terms]
    if memory is not None:
        terms = [
            replace(term, annotator=Remembered(term.annotator, str(position), memory, whole[position]))
            for position, term in enumerate(terms)
        ]
    if processes is not None and processes.world > 1:
        terms = [
            replace(term, annotator=Together(term.annotator, processes)) if of_all else term
            for term, of_all in zip(terms, whole, strict=True)
        ]
    if len(terms) == 1 and terms[0].plain:
        return terms[0].annotator
    names = _unique([term.annotator.name for term in terms])
    return CombinedAnnotator([replace(t, name=name) for name, t in zip(names, terms, strict=True)])


def _one(settings: RewardConfig, run_dir: Path | None) -> Annotator:
    """The annotator of one reward. Imports only what this one needs: an API judge does without torch."""
    ledger = run_dir / "spent.sqlite" if run_dir else None
    match settings:
        case FunctionReward():
            from dualign.annotate.function import FunctionAnnotator, load_function

            return FunctionAnnotator(load_function(settings.path), settings.name, settings.timeout)
        case HeadReward():
            from dualign.annotate.head import HeadAnnotator

            return HeadAnnotator(settings)
        case ClassifierReward():
            from dualign.annotate.reward_model import ClassifierAnnotator

            return ClassifierAnnotator(settings)
        case JudgeReward():
            from dualign.annotate.judge import JudgeAnnotator

            return JudgeAnnotator(settings, ledger=ledger)
        case PreferenceReward():
            from dualign.annotate.preference import PreferenceAnnotator

            return PreferenceAnnotator(settings, ledger=ledger)
        case ServedReward():
            from dualign.annotate.served import ServedAnnotator

            return ServedAnnotator(settings, ledger=ledger)


def _unique(names: Sequence[str]) -> list[str]:
    """The names, a repeated one followed by _2, _3, ..."""
    unique: list[str] = []
    for name in names:
        count = 1
        while (new := name if count == 1 else f"{name}_{count}") in unique:
            count += 1
        unique.append(new)
    return unique
