"""How rewards are configured: one strict class of settings for each `type`. It builds the annotator, checks what it
names, tells its price and says what a resume must find unchanged; nobody outside asks which type a reward is. No torch
here: what a method needs is imported when it is called, so that an API judge does without."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dualign.common.digests import Digests, of_code, of_file
from dualign.common.errors import UserError
from dualign.common.named import is_place
from dualign.common.settings import Settings

if TYPE_CHECKING:
    from dualign.annotate.base import Annotator

LATER = {"normalise": "none", "gate": None}  # keys that came later, with what they say where they are missing


class Gate(Settings):
    """What a reward's value must be for the others to count."""

    at_least: float | None = Field(None, description="it passes from this value on")
    at_most: float | None = Field(None, description="it passes up to this value")
    otherwise: float = Field(0.0, description="the row's reward where it does not pass")

    @model_validator(mode="after")
    def _bounds(self) -> Gate:
        if self.at_least is None and self.at_most is None:
            raise ValueError("give it at_least, at_most or both: {at_least: 0.5}")
        return self

    def passes(self, value: float) -> bool:
        low, high = self.at_least, self.at_most
        return (low is None or value >= low) and (high is None or value <= high)


class RewardSettings(Settings):
    """What every reward has. A type of one's own is a subclass with fields of its own and `build`, named by its place:
    `type: FILE.py:NAME`. Its fields are strict, and its methods may be overridden like those of the types below."""

    compares: ClassVar[bool] = False  # the completions of a prompt with each other: their mean says nothing
    ASKING: ClassVar[frozenset[str]] = frozenset()  # settings that change no label: a resume may change them

    type: str = Field("", description="what labels: a type that ships, or FILE.py:NAME")
    name: str | None = Field(None, description="its name in logs and Parquet; default: from the function or model")
    weight: float = Field(1.0, description="its factor in the sum of rewards")
    clip: list[float] | None = Field(
        None, min_length=2, max_length=2, description="[low, high]: its value is held within these, then weighted"
    )
    normalise: Literal["none", "group", "batch"] = Field(
        "none",
        description="after clip and before weight, less the mean and in standard deviations of its values: those of the "
        "same prompt, or of the online batch",
    )
    gate: Gate | None = Field(None, description="adds nothing: where its value does not pass, the others do not count")
    where: dict[str, str | int | bool] = Field(
        default_factory=dict,
        description="only rows whose data columns have these values; the other rewards decide the rest",
    )
    optional: bool = Field(
        False, description="where it gives None, the other rewards decide. Otherwise a row without its label is absent"
    )

    @field_validator("clip")
    @classmethod
    def _ordered(cls, clip: list[float] | None) -> list[float] | None:
        if clip is not None and not clip[0] < clip[1]:
            raise ValueError(f"[low, high] with low < high, not {clip}")
        return clip

    @model_validator(mode="after")
    def _adds_or_gates(self) -> Self:
        if self.gate and (self.weight != 1 or self.clip or self.normalise != "none"):
            raise ValueError("gate: its own value decides and is not added: leave out its weight, clip and normalise")
        return self

    @property
    def member_rewards(self) -> Sequence[RewardSettings]:
        """The rewards that it is made of, where it is."""
        return ()

    @property
    def all_rewards(self) -> Iterator[RewardSettings]:
        """Itself and all that it is made of."""
        yield self
        for member in self.member_rewards:
            yield from member.all_rewards

    def build(self, run_dir: Path | None = None) -> Annotator | Callable[..., Any]:
        """What labels: an annotator, or a function in TRL's convention. `run_dir`: where a run keeps its files; None
        outside of runs. Raises UserError for what cannot be loaded."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def check(self) -> None:
        """Raises UserError for what `build` would, as far as that is known without a server and before a run begins
        (`--dry-run`). Override it where building takes long."""
        from dualign.annotate import annotator_of

        annotator_of(self).close()

    def of_groups(self, k: int) -> RewardSettings:
        """Itself, for prompts with `k` completions each: what `dollars` and `describe` say may depend on that."""
        return self

    def dollars(self, labels: int) -> float:
        """What so many labels cost at most, about."""
        return 0.0

    def weights_held(self) -> tuple[float, float]:
        """Bytes of weights that it holds, about: on the device that trains, and in the host's memory. Raises UserError
        where that is not known."""
        return 0.0, 0.0

    def describe(self, labels: int) -> str:
        """A line of the plan of a run that needs so many labels."""
        if self.gate:
            return f"{self.type}, a gate: {self.gate.model_dump(exclude_none=True)}"
        over = f", normalised per {self.normalise}" if self.normalise != "none" else ""
        return f"{self.type}, weight {self.weight}{over}"

    def made_of(self) -> dict[str, Digests]:
        """What its labels come from beside the settings, by the setting that names it. Recorded when a run begins; a
        resume is refused where it has changed. An override adds to it: `super().made_of() | {"words": of_file(...)}`."""
        return {"type": of_code(self.type)} if is_place(self.type) else {}

    def decides(self) -> dict[str, Any]:
        """The settings that decide a label; of what it is made of, no place."""
        later = {key for key, default in LATER.items() if getattr(self, key) == default}  # as runs of before had it
        told = self.model_dump(mode="json", exclude={"name", *later, *self.ASKING, *self.made_of()})
        return told if "type" in told else told | {"class": self.type.rpartition(":")[2]}


class FunctionReward(RewardSettings):
    """A Python function `(prompts, completions, **columns) -> list[float | None]`, plain or async."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)
    ASKING: ClassVar[frozenset[str]] = frozenset({"timeout"})
    type: str = "function"
    path: str = Field(description="FILE.py:FUNCTION or package.module:FUNCTION")
    timeout: float | None = Field(None, gt=0, description="seconds; a late answer is absent")

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.function import FunctionAnnotator, load_function

        return FunctionAnnotator(load_function(self.path), self.name, self.timeout)

    def made_of(self) -> dict[str, Digests]:
        return super().made_of() | {"path": of_code(self.path)}

    def decides(self) -> dict[str, Any]:
        return super().decides() | {"function": self.path.rpartition(":")[2]}


class HeadReward(RewardSettings):
    """Frozen MiniLM features with a ridge Bradley-Terry head, made by `dualign reward fit`."""

    PATHS: ClassVar[tuple[str, ...]] = ("path",)
    type: str = "head"
    path: str = Field("builtin:harmless", description="a head file, or builtin:NAME")

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.head import HeadAnnotator

        return HeadAnnotator(self)

    def check(self) -> None:
        from dualign.annotate.head import load_head

        load_head(self.path)

    def weights_held(self) -> tuple[float, float]:
        return 0.0, 0.1e9  # the encoder's, in fp32

    def made_of(self) -> dict[str, Digests]:
        from dualign.annotate.head import file_of

        try:
            return super().made_of() | {"path": of_file(file_of(self.path))}
        except UserError:
            return super().made_of() | {"path": {}}


class ClassifierReward(RewardSettings):
    """A Hugging Face sequence classifier with one output, in process."""

    PATHS: ClassVar[tuple[str, ...]] = ("model",)
    type: str = "classifier"
    model: str = Field(description="a local folder or a hub name")
    revision: str | None = Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; only if you trust it")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="of its weights")
    offload: bool = Field(False, description="weights rest in the host's memory; layers visit the GPU one by one")
    batch_size: int = Field(16, ge=1, description="completions of one forward pass")
    max_tokens: int = Field(4096, ge=8, description="longer inputs are absent, never cut silently")

    def build(self, run_dir: Path | None = None) -> Annotator:
        from dualign.annotate.reward_model import ClassifierAnnotator

        return ClassifierAnnotator(self)

    def check(self) -> None:
        """Its weights are looked for when it is built."""

    def weights_held(self) -> tuple[float, float]:
        from transformers import AutoModelForSequenceClassification

        from dualign.models.architectures import on_meta

        model, _ = on_meta(AutoModelForSequenceClassification, self.model, self.revision, self.trust_remote_code)
        size = sum(p.numel() for p in model.parameters()) * (2.0 if self.dtype == "bfloat16" else 4.0)
        return (0.0, size) if self.offload else (size, 0.0)

    def made_of(self) -> dict[str, Digests]:
        from dualign.models.digests import of_model

        return super().made_of() | {"model": of_model(self.model, self.revision)}
