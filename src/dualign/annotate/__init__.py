"""What labels completions. `build` turns a run's reward settings into one annotator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dualign.annotate import serve
from dualign.annotate.base import Annotator, BatchSession, Item
from dualign.annotate.combined import CombinedAnnotator, Term
from dualign.annotate.registry import REWARDS
from dualign.annotate.remembered import Memory, Remembered
from dualign.annotate.settings import RewardSettings
from dualign.annotate.together import Together
from dualign.common.errors import UserError
from dualign.common.named import run_own
from dualign.common.processes import Processes
from dualign.common.types import Label

__all__ = ["Annotator", "BatchSession", "Item", "Label", "RewardSettings", "annotator_of", "as_list", "build"]

Reward = Callable[..., Any] | Annotator | RewardSettings  # as `dualign.train(reward=...)` takes it


def build(
    rewards: Sequence[RewardSettings],
    given: Sequence[Reward] = (),
    run_dir: Path | None = None,
    memory: Memory | None = None,
    processes: Processes | None = None,
) -> Annotator:
    """The annotator of `rewards` and of those that are `given` in Python: their weighted sum, or a single one as it is.
    What paid annotators buy is recorded under `run_dir`; what `memory` holds is not asked for. Where there are several
    `processes`, Python functions label the completions of all in one call. Raises UserError for what cannot be loaded."""
    with serve.held((*rewards, *given), run_dir, processes):
        terms = [_term(reward, run_dir) for reward in (*rewards, *given)]
    if not terms:
        raise UserError("no reward: give the run a `reward` section, or train(..., reward=function)")
    whole = [getattr(term.annotator, "whole_batch", False) for term in terms]
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


def as_list(reward: Any) -> list[Any]:
    """One reward that is given in Python, or several."""
    return list(reward) if isinstance(reward, list | tuple) else [reward]


def _term(reward: Reward, run_dir: Path | None) -> Term:
    annotator = annotator_of(reward, run_dir)
    if not isinstance(reward, RewardSettings):
        return Term("", annotator)
    return Term("", annotator, reward.weight, reward.optional, reward.where, reward.clip)


def annotator_of(reward: Reward, run_dir: Path | None = None) -> Annotator:
    """What labels by a reward's settings, by a Python function, or by itself. Raises UserError for anything else."""
    from dualign.annotate.function import FunctionAnnotator

    what, name, found = "reward", None, reward
    if isinstance(reward, RewardSettings):
        what = f"reward {reward.type or type(reward).__name__}, build"
        name = reward.name or type(reward).__name__
        found = _built(reward, run_dir, what)
    if callable(found) and not isinstance(found, type):
        return FunctionAnnotator(found, name)
    if isinstance(found, Annotator) and not isinstance(found, type):
        return found
    kind = f"the class {found.__name__}" if isinstance(found, type) else f"a value of type {type(found).__name__}"
    raise UserError(f"{what}: expected a function or an annotator (name, open, close), got {kind}")


def _built(settings: RewardSettings, run_dir: Path | None, what: str) -> Any:
    if type(settings) in REWARDS.values():
        return settings.build(run_dir)
    return run_own(f"{what}(run_dir)", lambda: settings.build(run_dir))


def _unique(names: Sequence[str]) -> list[str]:
    """The names, a repeated one followed by _2, _3, ..."""
    unique: list[str] = []
    for name in names:
        count = 1
        while (new := name if count == 1 else f"{name}_{count}") in unique:
            count += 1
        unique.append(new)
    return unique
