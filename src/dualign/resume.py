"""What may change between a run and its resumption."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from dualign import config as configs
from dualign.config import Config
from dualign.errors import UserError
from dualign.runs import Run

ALLOWED = (  # none of these changes a number that is already in the folder
    "train.online_batches",
    "train.micro_batch_tokens",
    "train.compile",
    "train.max_absent",
    "rollout.rows",
    "rollout.cuda_graphs",
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
    run.check(run.config_file, "A run's configuration is changed by overrides: dualign resume RUN key.sub=value")
    config = configs.load(run.config_file, overrides)
    check_changes(run, config)
    return config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})})


def check_changes(run: Run, config: Config) -> None:
    """Raises UserError, by name, for a key of `config` that may not differ from the run's own."""
    stored = configs.load(run.config_file)
    for key in configs.differences(stored, config):
        generic = ".".join("*" if part.isdigit() else part for part in key.split("."))
        if generic not in ALLOWED and key != "run.dir":
            raise UserError(
                f"{key} cannot change on resume: what is stored was made with its old value. These can: {', '.join(ALLOWED)}"
            )
        if key == "train.online_batches" and stored.train.decay:
            raise UserError(
                "train.online_batches cannot change on resume where train.decay is set: the rates of the updates that are "
                "done depend on it"
            )


def check_same_run(folder: Path, config: Config, functions: Sequence[str]) -> None:
    """Raises UserError where the run in `folder` cannot go on by `config` with the Python rewards of these names: a
    reward that is missing, or another, would be a wrong label."""
    run = Run.open(folder)
    had = run.functions
    if had is not None and had != list(functions):
        raise UserError(
            f"{folder}: its rewards came from Python: {', '.join(had) or 'none'}, now {', '.join(functions) or 'none'}. "
            "Go on with the same ones: dualign.train(config, reward=[...], resume=True); a recipe that names its rewards "
            "(type: function) is resumed from the command line"
        )
    check_changes(run, config)
