"""What a run was made from, by sha256: weights, tokenizer, data, templates, rewards. Names and places do not count.

`of_run` is recorded in run.json when a run begins; a resume and `dualign verify` hold it against what is there then.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dualign import data
from dualign.annotate import Reward
from dualign.annotate.settings import RewardSettings
from dualign.common.digests import Digests, changed, imported, of_code, of_file
from dualign.common.errors import UserError
from dualign.common.named import is_place
from dualign.common.paths import path_of
from dualign.config import Config
from dualign.models.digests import of_model
from dualign.models.settings import ModelConfig

__all__ = ["Digests", "changed", "of_data", "of_file", "of_model", "of_models", "of_reward", "of_rewards", "of_run"]


def of_run(config: Config, given: Sequence[Reward] = (), near: bool = False) -> dict[str, Digests]:
    """Everything that a run reads, by the key that names it. `given`: the rewards given in Python;
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
    if config.witness:
        found |= {f"witness.{key}": files for key, files in of_rewards(config.witness.reward).items()}
    return found | of_rewards(config.reward, given)


def of_models(m: ModelConfig) -> dict[str, Digests]:
    """The policy's and π_0's."""
    found = {"model.name": of_model(m.name, m.revision)}
    if m.reference:
        found["model.reference"] = of_model(m.reference, m.reference_revision)
    return found


def of_rewards(rewards: Sequence[RewardSettings], given: Sequence[Reward] = ()) -> dict[str, Digests]:
    """What a run's rewards read, likewise."""
    from dualign.annotate.function import name_of
    from dualign.common.code_digest import modules_of, of_function

    found = {f"reward.{i}.{key}": files for i, reward in enumerate(rewards) for key, files in reward.made_of().items()}
    for i, reward in enumerate(given):
        what = "reward function" if callable(reward) else "reward"
        code = of_function(reward)
        found[f"{what} {i} ({name_of(reward)})"] = {"its code": code} | imported(modules_of(reward)) if code else {}
    return found


def of_reward(settings: RewardSettings) -> str:
    """One digest of what decides a reward's labels: its settings, and the function, head, weights or rubric that they
    name, whatever these are called. (Not of a server's model: its name must do.)"""
    files = [sha256 for each in settings.made_of().values() for sha256 in each.values()]
    text = json.dumps([settings.decides(), sorted(files)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def of_data(source: str, subset: str | None = None, split: str = "train", near: bool = False) -> Digests:
    """A file's bytes; of a data set by folder or name, its rows (`near`: by folder alone)."""
    try:
        file = data.local_file(source, split)
    except UserError:
        return {}
    if file is not None:
        return of_file(file)
    folder = path_of(source)
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
