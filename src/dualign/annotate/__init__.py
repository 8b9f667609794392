"""What labels completions. `build` turns a run's reward settings into one annotator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualign.annotate import serve
from dualign.annotate.base import Annotator, BatchSession, Item
from dualign.annotate.budget import paid
from dualign.annotate.combined import CombinedAnnotator, Term
from dualign.annotate.composite import CompositeReward
from dualign.annotate.registry import REWARDS
from dualign.annotate.remembered import Memory, Remembered
from dualign.annotate.settings import RewardSettings
from dualign.annotate.together import Together
from dualign.common.errors import UserError
from dualign.common.named import run_own
from dualign.common.processes import Processes
from dualign.common.types import Label

__all__ = ["Annotator", "BatchSession", "Item", "Label", "RewardSettings", "annotator_of", "as_list", "build", "paid"]

NO_REWARD = "reward: none given; name at least one (type: function, head, classifier, judge, ...)"
ONLY_GATES = "reward: all are gates, and there is nothing for them to let through; name one that adds"
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
    place = _Place(run_dir, memory, processes or Processes())
    with serve.held((*rewards, *given), run_dir, processes):
        terms = [_term(reward, str(position), place) for position, reward in enumerate((*rewards, *given))]
    if not terms:
        raise UserError("no reward: give the run a `reward` section, or train(..., reward=function)")
    if all(term.gate for term in terms):
        raise UserError(ONLY_GATES)
    if len(terms) == 1 and terms[0].plain:
        return terms[0].annotator
    return CombinedAnnotator(terms, processes=place.processes)


def composed(reward: CompositeReward, run_dir: Path | None = None) -> Annotator:
    """The annotator of a reward that is made of rewards, outside of a run's."""
    return _composed(reward, "", _Place(run_dir, None, Processes()))


def as_list(reward: Any) -> list[Any]:
    """One reward that is given in Python, or several."""
    return list(reward) if isinstance(reward, list | tuple) else [reward]


@dataclass(frozen=True)
class _Place:
    """Where annotators are built: what they share."""

    run_dir: Path | None
    memory: Memory | None
    processes: Processes
    names: list[str] = field(default_factory=list)  # that are taken

    def own_name(self, name: str) -> str:
        """The name, a repeated one followed by _2, _3, ..."""
        count = 1
        while (new := name if count == 1 else f"{name}_{count}") in self.names:
            count += 1
        self.names.append(new)
        return new


def _term(reward: Reward, key: str, place: _Place) -> Term:
    """`key`: its position, in which its labels are remembered."""
    if isinstance(reward, CompositeReward):  # its members are remembered, each alone
        annotator: Annotator = _composed(reward, key, place)
    else:
        annotator = annotator_of(reward, place.run_dir)
        whole = getattr(annotator, "whole_batch", False)
        if place.memory is not None:
            annotator = Remembered(annotator, key, place.memory, whole)
        if whole and place.processes.world > 1:
            annotator = Together(annotator, place.processes)
    name = place.own_name(annotator.name)
    if not isinstance(reward, RewardSettings):
        return Term(name, annotator)
    r = reward
    return Term(name, annotator, r.weight, r.optional, r.where, r.clip, r.normalise, r.gate)


def _composed(reward: CompositeReward, key: str, place: _Place) -> CombinedAnnotator:
    terms = [_term(member, f"{key}.{i}", place) for i, member in enumerate(reward.of)]
    name = reward.name or reward.type.rpartition(":")[2]
    return CombinedAnnotator(terms, reward.join, reward.LEAST, name, place.processes)


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
