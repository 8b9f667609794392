"""π_0 by supervised fine-tuning, as the papers make it: on demonstrations, or on the chosen responses of a preference
set (ICLR 2026, App. B.1). The same trainer, with algo sft."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dualign import config as configs
from dualign.algos import Algorithm
from dualign.common.errors import UserError
from dualign.config import Config

LR = 5e-6  # ICLR 2026, App. B.1


def sft_config(
    recipe: str | None = None,
    overrides: Sequence[str] = (),
    data: str | None = None,
    model: str | None = None,
    out: str | None = None,
    epochs: float | None = None,
) -> Config:
    """The run of a recipe, or of flags alone. `epochs` sets train.online_batches by the data's length. Raises
    UserError for what is missing, or for a recipe of another system."""
    tree: dict[str, Any] = {"algo": {"name": "sft"}, "train": {"online_batches": 0, "online_batch": 32, "lr": LR}}
    where = "sft"
    if recipe is not None:
        tree, path = configs.read(recipe)
        where = str(path)
    flags: dict[str, Any] = {"model": {"name": model}, "data": {"train": data}, "run": {"dir": out}}
    for section, entry in flags.items():
        known = {key: value for key, value in entry.items() if value is not None}
        tree = configs.merge(tree, {section: known} if known else {})
    tree = configs.overridden(tree, overrides)
    if recipe is None:
        missing = [flag for flag, value in {"--data": data, "--model": model, "--out": out}.items() if value is None]
        if missing:
            raise UserError(f"sft: without a recipe it also needs {', '.join(missing)}")
    config = configs.build(tree, where)
    algo: Algorithm = config.algo
    if algo.source != "demonstrations":
        raise UserError(f"{where}: its algo is {algo.name}; `dualign train` runs it, `dualign sft` runs sft")
    counted = any(o.startswith("train.online_batches=") for o in overrides)
    if epochs is None and (recipe is not None or counted):
        return config
    batches = _batches(config, 1.0 if epochs is None else epochs)
    return config.model_copy(update={"train": config.train.model_copy(update={"online_batches": batches})})


def _batches(config: Config, epochs: float) -> int:
    from dualign.data.rows import load_examples

    rows = len(load_examples(config.data.train, config.data, config.data.split))
    return max(1, math.ceil(rows * epochs / config.prompts_per_batch))


def make(config: Config) -> Path:
    """Trains, or resumes the same run where it was cut off, and returns DIR/model: a link to the last checkpoint, which
    opens with from_pretrained and can be the next run's model.name."""
    from dualign.run.named import pinned
    from dualign.trainer import train

    config = pinned(config)
    folder = Path(config.run.dir)
    begun = (folder / "config.yaml").is_file()
    if begun and configs.load(folder / "config.yaml") != config:
        raise UserError(f"run.dir: {folder} holds a run with other settings; choose another folder")
    run = train(config, resume=begun)
    link = run.folder / "model"
    aside = run.folder / f".model-{os.getpid()}"  # put in place in one step, by any of several processes
    os.symlink(run.saved()[-1].relative_to(run.folder), aside)
    os.replace(aside, link)
    return link
