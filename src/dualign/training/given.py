"""What Python gives as objects, as a configuration that says the same: a run can then be resumed from anywhere."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dualign import assets
from dualign.algos import ALGORITHMS, Algorithm
from dualign.annotate.composite import CompositeReward
from dualign.annotate.registry import REWARDS
from dualign.annotate.settings import RewardSettings
from dualign.common.durable import write_text
from dualign.common.errors import UserError
from dualign.config import Config, build
from dualign.data.conversation import kind_of
from dualign.run.digests import of_model
from dualign.run.named import pinned
from dualign.training.callbacks import Callback

Rows = Iterable[Mapping[str, Any]]  # a datasets.Dataset, or a list of rows


def with_given(
    config: Config,
    algo: Algorithm | None = None,
    model: Any = None,
    tokenizer: Any = None,
    data: Rows | None = None,
    eval_data: Rows | None = None,
    rewards: Sequence[RewardSettings] = (),
    sampler: Any = None,
    callbacks: Any = (),
) -> Config:
    """`config` with these in place of what it names, and `rewards` beside its own. Rows and models are written into the
    cache, by their content; a run that is named as a model is pinned to its checkpoint. Raises UserError for what cannot
    be written down, and for what is not what it should be: a `sampler` and `callbacks`, too."""
    if not isinstance(config, Config):
        raise UserError(f"config: expected a dict or what dualign.load gives, not {kind_of(config)}")
    if algo is not None and not isinstance(algo, Algorithm):
        raise UserError(f"algo: expected an instance of a dualign.Algorithm, not {_told(algo)}; one of ours: algo.name")
    if sampler is not None and (isinstance(sampler, type) or not all(hasattr(sampler, m) for m in ("sample", "sync"))):
        raise UserError(
            f"sampler: expected an object with the methods sample and sync, not {_told(sampler)}; a dualign.SamplerSettings "
            "is named by rollout.engine=FILE.py:NAME, and what it is set to by rollout.options"
        )
    if not isinstance(callbacks, Sequence) or not all(isinstance(each, Callback) for each in callbacks):
        raise UserError(f"callbacks: expected a list of dualign.Callback objects, not {callbacks!r}")
    if model is None and tokenizer is not None:
        raise UserError("tokenizer: give its model, too: train(..., model=model, tokenizer=tokenizer)")
    if not rewards and all(given is None for given in (algo, model, data, eval_data)):
        return pinned(config)
    tree = config.model_dump()
    named = algo and algo.model_copy(update={"name": _name("algo", algo, algo.name, ALGORITHMS)})
    tree["algo"] = named or config.algo
    tree["reward"] = [*config.reward, *map(_named, rewards)]
    if data is not None:
        tree["data"]["train"] = _rows(data, "data")
    if eval_data is not None:
        tree["data"]["eval"] = _rows(eval_data, "eval_data")
    if model is not None:
        tree["model"] |= {"name": _model(model, tokenizer), "revision": None}
    return pinned(build(tree))


def _told(given: object) -> str:
    """What Python gave, in words."""
    return f"the class {given.__name__}" if isinstance(given, type) else kind_of(given)


def _named(reward: RewardSettings) -> RewardSettings:
    """The reward with a type by which it is found again, and so what it is made of."""
    named: dict[str, Any] = {"type": _name("reward", reward, reward.type, REWARDS)}
    if isinstance(reward, CompositeReward):
        named["of"] = [_named(member) for member in reward.of]
    return reward.model_copy(update=named)


def _name(key: str, given: object, name: str, ours: Mapping[str, type]) -> str:
    """What a recipe calls a system or a reward's type: one of ours by its name, another by where its class stands."""
    kind = type(given)
    if ours.get(name) is kind:
        return name
    try:
        file = inspect.getsourcefile(kind)
    except (TypeError, OSError):  # of a notebook, or of no module
        file = None
    if file is None or "." in kind.__qualname__:
        raise UserError(f"{key}: {kind.__qualname__} must stand at the top of a file, so that a resume finds it again")
    return f"{Path(file).resolve()}:{kind.__name__}"


def _rows(rows: Rows, key: str) -> str:
    if isinstance(rows, str | bytes | Mapping):
        raise UserError(f"{key}: expected rows (a list of mappings, or a datasets.Dataset), not {type(rows).__name__}")

    def line(number: int, row: Any) -> str:
        if not isinstance(row, Mapping):
            raise UserError(f"{key}, row {number}: expected a mapping such as {{'prompt': ...}}, got {kind_of(row)}")
        return json.dumps(dict(row), ensure_ascii=False) + "\n"

    try:
        text = "".join(line(number, row) for number, row in enumerate(rows, 1))
    except (TypeError, ValueError) as error:
        raise UserError(f"{key}: a row cannot be written as JSON: {error}") from None
    file = assets.cache_dir() / "given" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, text)
    return str(file)


def _model(model: Any, tokenizer: Any) -> str:
    if not hasattr(model, "save_pretrained"):
        raise UserError(f"model: expected one of transformers, not {_told(model)}; a name or folder is model.name")
    if not hasattr(tokenizer, "save_pretrained"):
        raise UserError("model: give its tokenizer, too: train(..., model=model, tokenizer=tokenizer)")
    place = assets.cache_dir() / "given"
    place.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=place, prefix=".model-"))
    try:
        model.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        digest = hashlib.sha256(json.dumps(of_model(str(aside)), sort_keys=True).encode()).hexdigest()[:32]
        if not (place / digest).exists():
            aside.rename(place / digest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return str(place / digest)
