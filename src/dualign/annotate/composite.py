"""Rewards that are made of rewards: the least of several, their product, or an ensemble that pays for disagreement."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from dualign.annotate.settings import RewardSettings
from dualign.common.digests import Digests
from dualign.common.errors import UserError

if TYPE_CHECKING:
    from dualign.annotate.base import Annotator


def _member(tree: Any, info: ValidationInfo) -> RewardSettings:
    from dualign.annotate.registry import of_its_type  # which knows these types, too

    return tree if isinstance(tree, RewardSettings) else of_its_type(tree, info)


Member = Annotated[SerializeAsAny[RewardSettings], BeforeValidator(_member)]


class CompositeReward(RewardSettings):
    """One reward of several. Each member has all keys of a reward: it is bounded, normalised and weighted before they
    are joined, or it is a gate among them."""

    LEAST: ClassVar[int] = 1  # members that must have a label
    of: list[Member] = Field(min_length=2, description="the rewards that it is made of, each written as in `reward`")

    @model_validator(mode="after")
    def _has_values(self) -> Self:
        if sum(member.gate is None for member in self.of) < self.LEAST:
            raise ValueError(f"of: needs {self.LEAST} or more members that are no gates")
        return self

    @property
    def member_rewards(self) -> Sequence[RewardSettings]:
        return self.of

    @property
    def join(self) -> Callable[[Sequence[float]], float]:
        """One value of those of its labelled members."""
        raise NotImplementedError

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate import composed

        return composed(self, run_dir)

    def check(self) -> None:
        faults = []
        for i, member in enumerate(self.of):
            try:
                member.check()
            except UserError as error:
                faults.append(f"of.{i}: {error}")
        if faults:
            raise UserError("; ".join(faults))

    def dollars(self, labels: int) -> float:
        return sum(member.dollars(labels) for member in self.of)

    def weights_held(self) -> tuple[float, float]:
        each = [member.weights_held() for member in self.of]
        return sum(here for here, _ in each), sum(host for _, host in each)

    def describe(self, labels: int) -> str:
        lines = [super().describe(labels)]
        for i, member in enumerate(self.of):
            lines += [f"  of.{i}: {member.describe(labels)}".replace("\n", "\n  ")]
        return "\n".join(lines)

    def made_of(self) -> dict[str, Digests]:
        inner = {f"of.{i}.{key}": files for i, member in enumerate(self.of) for key, files in member.made_of().items()}
        return super().made_of() | inner

    def decides(self) -> dict[str, Any]:
        return super().decides() | {"of": [member.decides() for member in self.of]}


class MinimumReward(CompositeReward):
    """The least of its members' values: an answer is worth what its worst side is worth."""

    type: str = "minimum"

    @property
    def join(self) -> Callable[[Sequence[float]], float]:
        return min


class ProductReward(CompositeReward):
    """Its members' values multiplied."""

    type: str = "product"

    @property
    def join(self) -> Callable[[Sequence[float]], float]:
        return math.prod


class EnsembleReward(CompositeReward):
    """The mean of its members' values less k of their standard deviations (the sample's, n − 1): what they disagree on
    is worth less (Coste et al. 2024, arXiv:2310.02743). A row on which fewer than two have a label is absent."""

    LEAST: ClassVar[int] = 2
    type: str = "ensemble"
    k: float = Field(1.0, ge=0, description="standard deviations that are taken from the mean; 0: the mean")

    @property
    def join(self) -> Callable[[Sequence[float]], float]:
        return lambda values: statistics.fmean(values) - self.k * statistics.stdev(values)
