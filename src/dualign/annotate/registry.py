"""Settings of a reward by the name of its type: those that ship, and those of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, ConfigDict, SerializeAsAny, ValidationError, ValidationInfo

from dualign.annotate.composite import EnsembleReward, MinimumReward, ProductReward
from dualign.annotate.endpoints import JudgeReward, PreferenceReward, ServedReward
from dualign.annotate.settings import ClassifierReward, FunctionReward, HeadReward, RewardSettings
from dualign.common.errors import UserError
from dualign.common.named import class_of, is_place
from dualign.common.settings import fault_at

if TYPE_CHECKING:
    from dualign.annotate.base import Annotator

REWARDS: dict[str, type[RewardSettings]] = {
    "function": FunctionReward,
    "head": HeadReward,
    "classifier": ClassifierReward,
    "served": ServedReward,
    "judge": JudgeReward,
    "preference": PreferenceReward,
    "minimum": MinimumReward,
    "product": ProductReward,
    "ensemble": EnsembleReward,
}


class StaleReward(RewardSettings):
    """Of a run's folder: a reward of one's own whose code is gone, or takes these settings no more. The folder can be
    read all the same; nothing can be labelled."""

    model_config = ConfigDict(extra="allow")

    def build(self, run_dir: Path | None = None) -> Annotator:
        raise UserError(
            f"reward {self.type}: its code is not there, or does not take the settings that the run has: put it back as it "
            "was, or name its new place: dualign resume RUN reward.N.type=FILE.py:NAME"
        )


def settings_class(kind: Any) -> type[RewardSettings]:
    """The settings of a `type`. Raises ValueError for what is none."""
    if kind is None:
        raise ValueError("missing")
    function = f"; a function is written {{type: function, path: {kind}}}"
    return class_of(str(kind), REWARDS, RewardSettings, hint=function)


def of_its_type(tree: Any, info: ValidationInfo) -> RewardSettings:
    """Settings by the class of their `type`. With {"stored": True} as context, what cannot be had is a StaleReward."""
    if isinstance(tree, RewardSettings):
        for each in tree.all_rewards:
            if REWARDS.get(each.type) is not type(each) and not is_place(each.type):
                raise ValueError(
                    f"{type(each).__name__} has no place to be found again: give it to train(..., reward=...)"
                )
        return tree
    if not isinstance(tree, Mapping):
        raise ValueError(f"expected a mapping with a type ({', '.join(REWARDS)}, or FILE.py:NAME), not {tree!r}")
    kind = tree.get("type")
    try:
        return settings_class(kind).model_validate(tree, context=info.context)
    except ValueError as error:  # a ValidationError is one, too
        if is_place(str(kind)) and (info.context or {}).get("stored"):
            return StaleReward.model_validate(tree)
        if isinstance(error, ValidationError):
            raise
        raise fault_at("type", kind, error) from None


RewardConfig = Annotated[SerializeAsAny[RewardSettings], BeforeValidator(of_its_type)]
