"""What a run was made from, by sha256: weights, tokenizer, data, templates, rewards. Names and places do not count.

`of_run` is recorded in run.json when a run begins; a resume and `dualign verify` hold it against what is there then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dualign import data
from dualign.annotate.settings import (
    ClassifierReward,
    FunctionReward,
    HeadReward,
    JudgeReward,
    PreferenceReward,
    RewardConfig,
)
from dualign.common.digests import Digests, changed, imported, of_code, of_file
from dualign.common.errors import UserError
from dualign.common.named import is_place
from dualign.config import Config
from dualign.models.digests import of_model
from dualign.models.settings import ModelConfig

__all__ = ["Digests", "changed", "of_data", "of_file", "of_model", "of_models", "of_reward", "of_rewards", "of_run"]
ASKING = {  # settings of a reward that say how it is asked, and change no label
    "api_key_env", "base_url", "cache", "concurrency", "max_calls", "max_dollars", "max_tokens_total", "name",
    "price_completion", "price_prompt", "requests_per_minute", "retries", "timeout", "tokens_per_minute",
}  # fmt: skip


def of_run(config: Config, functions: Sequence[Callable[..., Any]] = (), near: bool = False) -> dict[str, Digests]:
    """Everything that a run reads, by the key that names it. `functions`: the rewards given as Python functions;
    `near`: without data sets by name, which a hub might be asked for."""
    d, m = config.data, config.model
    found = of_models(m) | {"data.train": of_data(d.train, d.subset, d.split, near)}
    if m.chat_template:
        found["model.chat_template"] = of_file(m.chat_template)
    for key, place in {"algo.name": config.algo.name, "rollout.engine": config.rollout.engine}.items():
        if is_place(place):  # code of the user's own
            found[key] = of_code(place)
    if d.eval:
        found["data.eval"] = of_data(d.eval, d.subset, d.eval_split, near)
    return found | of_rewards(config.reward, functions)


def of_models(m: ModelConfig) -> dict[str, Digests]:
    """The policy's and π_0's."""
    found = {"model.name": of_model(m.name, m.revision)}
    if m.reference:
        found["model.reference"] = of_model(m.reference, m.reference_revision)
    return found


def of_rewards(rewards: Sequence[RewardConfig], functions: Sequence[Callable[..., Any]] = ()) -> dict[str, Digests]:
    """What a run's rewards read, likewise."""
    from dualign.annotate.function import name_of
    from dualign.common.code_digest import modules_of, of_function

    found = {}
    for i, reward in enumerate(rewards):
        key, files = _files_of(reward)
        if key:
            found[f"reward.{i}.{key}"] = files
    for i, function in enumerate(functions):
        code = of_function(function)
        made_of = {"its code": code} | imported(modules_of(function)) if code else {}
        found[f"reward function {i} ({name_of(function)})"] = made_of
    return found


def of_reward(settings: RewardConfig) -> str:
    """One digest of what decides a reward's labels: its settings, and the function, head, weights or rubric that they
    name, whatever these are called. (Not of a server's model: its name must do.)"""
    key, files = _files_of(settings)
    told = settings.model_dump(mode="json", exclude={*ASKING, key} if key else ASKING)
    if isinstance(settings, FunctionReward):
        told["function"] = settings.path.rpartition(":")[2]
    text = json.dumps([told, sorted(files.values())], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_data(source: str, subset: str | None = None, split: str = "train", near: bool = False) -> Digests:
    """A file's bytes; of a data set by folder or name, its rows (`near`: by folder alone)."""
    try:
        file = data.local_file(source, split)
    except UserError:
        return {}
    if file is not None:
        return of_file(file)
    folder = Path(source).expanduser()
    if near and not folder.is_dir():
        return {}
    return _of_rows(str(folder) if folder.is_dir() else source, subset, split)


def _of_rows(source: str, subset: str | None, split: str) -> Digests:
    try:
        rows = data.load_dataset(source, subset, split)
    except UserError:
        return {}
    found = hashlib.sha256()
    for batch in rows.with_format("arrow").iter(1000):
        for column in batch.column_names:
            found.update(f"{column} {batch.schema.field(column).type}\0".encode())
            found.update(json.dumps(batch[column].to_pylist(), default=repr).encode())
    return {"rows": found.hexdigest()}


def _files_of(reward: RewardConfig) -> tuple[str, Digests]:
    """The key of a reward that names what it is made of, and that; "" where none does."""
    from dualign.annotate import rubric

    match reward:
        case FunctionReward():
            return "path", of_code(reward.path)
        case HeadReward():
            from dualign.annotate.head import file_of

            try:
                return "path", of_file(file_of(reward.path))
            except UserError:
                return "path", {}
        case ClassifierReward():
            return "model", of_model(reward.model, reward.revision)
        case JudgeReward() | PreferenceReward():
            shipped = resources.files("dualign.annotate") / "rubrics" / f"{reward.rubric}.yaml"
            return "rubric", of_file(str(shipped) if reward.rubric in rubric.BUILT_IN else reward.rubric)
    return "", {}
