"""The section `data` of a run's configuration."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from dualign.common.settings import Settings


class DataConfig(Settings):
    PATHS: ClassVar[tuple[str, ...]] = ("train", "eval")
    train: str = Field(
        description="a .jsonl[.gz], .json, .csv or .parquet file, a data set's name, or builtin:quickstart"
    )
    eval: str | None = Field(
        None,
        description="held-out prompts, likewise; where a system on a fixed set has no reward, held-out pairs or "
        "demonstrations; none: no before/after evaluation",
    )
    split: str = Field("train", description="split of a data set taken by name")
    eval_split: str = Field("test", description="the same of the held-out prompts")
    subset: str | None = Field(None, description="configuration of a data set taken by name")
    format: Literal["auto", "prompt", "completion", "messages", "preference", "hh"] = Field(
        "auto", description="auto: by the columns"
    )
    prompt_column: str = Field("prompt", description="the column that holds the prompt")
    chat: bool = Field(False, description="plain-text prompts are a user's message, put in the model's chat template")
    system_prompt: str | None = Field(None, description="put before every conversation that has none")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="longer prompts are left out and counted; none: an error"
    )
    bad_rows: Literal["stop", "skip"] = Field(
        "stop", description="a row that is not of the data's format stops the run, or is left out and counted"
    )
    shuffle: bool = Field(True, description="a new order in every epoch, by the run's seed; false: the file's")
