"""What may change between a run and its resumption."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from dualign import config as configs
from dualign.config import Config
from dualign.errors import UserError
from dualign.runs import Run

ALLOWED = (  # none of these changes a number that is already in the folder
    "train.online_batches",
    "train.micro_batch_tokens",
    "train.max_absent",
    "rollout.rows",
    "eval.every",
    "run.checkpoints",
    "run.keep_last",
    "run.trackers",
    "run.project",
    "reward.*.concurrency",
    "reward.*.requests_per_minute",
    "reward.*.tokens_per_minute",
    "reward.*.timeout",
    "reward.*.retries",
    "reward.*.api_key_env",
    "reward.*.max_dollars",
    "reward.*.price_prompt",
    "reward.*.price_completion",
    "reward.*.max_tokens_total",
    "reward.*.max_calls",
    "reward.*.base_url",
)


def resumed_config(folder: Path, overrides: Iterable[str]) -> Config:
    """The run's own configuration with overrides. Raises UserError for a key that may not change any more."""
    run = Run.open(folder)
    overrides = list(overrides)
    for override in overrides:
        key = override.partition("=")[0]
        generic = ".".join("*" if part.isdigit() else part for part in key.split("."))
        if generic not in ALLOWED:
            raise UserError(
                f"{key} cannot change on resume: what is stored was made with its old value. These can: {', '.join(ALLOWED)}"
            )
        if key == "train.online_batches" and configs.load(run.config_file).train.decay:
            raise UserError(
                "train.online_batches cannot change on resume where train.decay is set: the rates of the updates that are "
                "done depend on it"
            )
    run.check(run.config_file, "A run's configuration is changed by overrides: dualign resume RUN key.sub=value")
    config = configs.load(run.config_file, overrides)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})
