"""A run's whole configuration: YAML recipe + `key.sub=value` overrides -> one strict model; bad keys are named."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, Field, SerializeAsAny, ValidationError, field_validator, model_validator

from dualign.algos import ALGORITHMS, Algorithm
from dualign.algos.own import guarded
from dualign.annotate.registry import RewardConfig, settings_class
from dualign.annotate.settings import RewardSettings
from dualign.common.errors import UserError
from dualign.common.named import class_of, is_place
from dualign.common.settings import Settings, fault_at
from dualign.common.yaml_text import parse_yaml
from dualign.config import foreign
from dualign.config.differences import differences as differences
from dualign.config.overrides import apply as apply
from dualign.config.overrides import overridden as overridden
from dualign.config.recipe_files import find as find
from dualign.config.recipe_files import recipes as recipes
from dualign.config.renamed import with_new_names
from dualign.config.samples import check_samples
from dualign.config.sections import EvalConfig, RunConfig, TrainConfig, WitnessConfig
from dualign.data.settings import DataConfig
from dualign.models.settings import ModelConfig
from dualign.rollout.settings import ENGINES, RolloutConfig, SamplerSettings

DEFAULT = "dar"


class Config(Settings):
    """All sections; defaults are the vetted setting."""

    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    reward: list[RewardConfig] = Field(default_factory=list)
    train: TrainConfig
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()
    witness: WitnessConfig | None = None
    algo: SerializeAsAny[Algorithm] = ALGORITHMS[DEFAULT](name=DEFAULT)

    @field_validator("algo", mode="before")
    @classmethod
    def _of_system(cls, algo: Any) -> Any:
        """By its name, so that each system has its own keys."""
        return system_of(algo).model_validate(algo) if isinstance(algo, dict) else algo

    @model_validator(mode="after")
    def _counts(self) -> Self:
        algo: Algorithm = self.algo
        k = self.rollout.k if algo.source == "online" else {"pairs": 2, "demonstrations": 1}[algo.source]
        t = self.train
        for key, count in {"train.online_batch": t.online_batch, "train.update_size": t.update_size}.items():
            if count % k:
                near = max(k, count // k * k)
                raise ValueError(f"{key}: {count} completions are no whole number of prompts at {k} each; try {near}")
        if t.update_size > t.online_batch:
            raise ValueError(f"train.update_size: {t.update_size} is more than train.online_batch ({t.online_batch})")
        algo.check(k)
        if not four_bits_whole(self):
            raise ValueError("model.lora.quantize: 4 bits cannot be divided (train.shard) or be a value model (PPO)")
        if self.eval.kl == "exact" and t.shard != "none":
            raise ValueError("eval.kl: exact needs whole models (train.shard: none)")
        check_samples(algo, self.rollout, t)
        if self.data.eval is not None and any(each.compares for reward in self.reward for each in reward.all_rewards):
            raise ValueError(
                "data.eval: an AI preference compares the completions of one prompt with each other, so its mean on held-out "
                "prompts never changes; set data.eval: null, and hold checkpoints against π_0 with `dualign eval winrate`"
            )
        return self

    @property
    def group(self) -> int:
        """Completions per prompt in the batches that the algorithm sees."""
        return {"online": self.rollout.k, "pairs": 2, "demonstrations": 1}[self.algo.source]

    @property
    def prompts_per_batch(self) -> int:
        return self.train.online_batch // self.group

    @property
    def updates_per_batch(self) -> int:
        """Optimizer steps of an online batch that is full, with those on batches that are trained on again."""
        return self._updates * self.algo.epochs * (1 + len(self.train.reuse))

    @property
    def _updates(self) -> int:
        """Of one pass over a batch."""
        return self.algo.updates_per_batch or max(1, round(self.train.online_batch / self.train.update_size))

    @property
    def needs_old(self) -> bool:
        """Whether log π_t is scored: the system wants it, or it changes while a batch is used."""
        return self.algo.needs_old or bool(self.rollout.ahead or self.train.reuse)

    @property
    def update_completions(self) -> str:
        """How many completions an optimizer step has: an online batch's prompts are split evenly, in words."""
        updates = self._updates
        least = self.prompts_per_batch // updates * self.group
        return str(least) if self.prompts_per_batch % updates == 0 else f"{least} or {least + self.group}"

    @property
    def labels(self) -> tuple[int, int]:
        """Labels that a run buys at most, to train and to evaluate."""
        t, e = self.train, self.eval
        evaluations = 2 + ((t.online_batches - 1) // e.every if e.every else 0)
        batch = t.online_batch + self.rollout.resample * self.rollout.k
        train = t.online_batches * batch if self.algo.source == "online" else 0
        return train, evaluations * e.prompts * e.k if self.data.eval and self.reward else 0


def four_bits_whole(config: Config) -> bool:
    """Whether weights of 4 bits, if there are some, are those of a whole policy."""
    lora = config.model.lora
    return not (lora and lora.quantize) or (config.train.shard == "none" and not config.algo.critic)


def system_of(algo: dict[str, Any]) -> type[Algorithm]:
    """The system whose settings these are. Raises ValidationError, at `name`."""
    name = algo.get("name")
    try:
        if not isinstance(name, str):
            raise ValueError("missing" if name is None else f"expected a system's name, not {name!r}")
        kind = class_of(name, ALGORITHMS, Algorithm)
        return guarded(kind, name) if is_place(name) else kind
    except ValueError as error:
        raise fault_at("name", name, error) from None


def load(recipe: str | Path, overrides: Iterable[str] = (), bf16: bool | None = None) -> Config:
    """The configuration of a recipe (a YAML file, or the name of a shipped one) with overrides applied. `bf16`: whether
    the machine that it is for has units for it, which `auto` asks; None: this machine is looked at.

    Raises UserError naming the file and key at fault.
    """
    written, path = read(recipe)
    given = list(overrides)
    tree = overridden(written, given)
    try:
        return build(tree, str(path), stored=(path.parent / "run.json").is_file(), bf16=bf16)
    except UserError as error:  # what an override said is not the file's fault
        keys = [override.partition("=")[0] for override in given]
        lines = [_whose(line, str(path), keys, written) for line in str(error).splitlines()]
        raise UserError("\n".join(lines)) from None


def _whose(line: str, path: str, keys: Iterable[str], written: dict[str, Any]) -> str:
    """A fault's line, said of the override that it is of: one that set the key, or a section that the file has not."""
    for key in keys:
        fault = line.removeprefix(f"{path}: ")
        if re.match(rf"{re.escape(key)}[:.]", fault):
            return f"override {fault}"
        section = fault.partition(":")[0]
        if key.startswith(f"{section}.") and section not in written:
            return f"override {key}: {fault}"
    return line


def read(recipe: str | Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Path]:
    """A recipe's plain tree, laid over that of its `base` recipe where it names one, and the file it came from."""
    path = find(recipe, above[-1].parent if above else Path())
    if path in above:
        raise UserError(f"{path}: base: the recipe is its own base, by way of {above[-1]}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    tree = parse_yaml(text, str(path))
    if not isinstance(tree, dict):
        kind = type(tree).__name__
        raise UserError(f"{path}: a recipe is a mapping of sections (model, data, algo, ...), not {kind}")
    base = tree.pop("base", None)
    if not isinstance(base, str | None):
        raise UserError(f"{path}: base: expected a recipe's name or file, not {base!r}")
    tree = with_new_names(one_reward(tree), (path.parent / "run.json").is_file())
    return (merge(read(base, (*above, path))[0], tree) if base else tree), path


def merge(base: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    """`patch` laid over `base`, key by key within sections. A list replaces a list; an algo that has a name replaces
    the base's: one system's α is not another's. So do another sampler's options."""
    out = dict(base)
    if patch.get("engine", held := out.get("engine", "hf")) != held:
        out.pop("options", None)
    for key, value in one_reward(patch).items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = merge(out[key], value) if both and not (key == "algo" and "name" in value) else value
    return out


def one_reward(tree: dict[str, Any]) -> dict[str, Any]:
    """A single reward may be written without the list's dash, a witness's too."""
    if isinstance(witness := tree.get("witness"), dict):
        tree = {**tree, "witness": one_reward(witness)}
    return {**tree, "reward": [tree["reward"]]} if isinstance(tree.get("reward"), dict) else tree


def default_system(tree: dict[str, Any]) -> dict[str, Any]:
    """Settings of an algorithm without its name are those of the default system."""
    algo = tree.get("algo")
    return {**tree, "algo": {"name": DEFAULT, **algo}} if isinstance(algo, dict) else tree


def build(tree: dict[str, Any], where: str = "config", stored: bool = False, bf16: bool | None = None) -> Config:
    """A checked Config from a plain tree. Raises UserError with one line per fault. One that is `stored` in a run's
    folder can be read without the reward's code of one's own that it names. `bf16`: as `load` has it."""
    tree = with_new_names(default_system(one_reward(tree)), stored)
    try:
        config = Config.model_validate(tree, context={"stored": stored, "bf16": bf16})
        return _as_begun(config) if stored else config
    except ValidationError as error:
        lines = [_explain(tree, item) for item in error.errors()]
        raise UserError("\n".join(f"{where}: {line}" for line in dict.fromkeys(lines))) from None


def _as_begun(config: Config) -> Config:
    """A run with a value model that was begun before model.lora.value_model was there trained all of it."""
    lora = config.model.lora
    if lora is None or not config.algo.critic or "value_model" in lora.model_fields_set:
        return config
    model = config.model.model_copy(update={"lora": lora.model_copy(update={"value_model": "whole"})})
    return config.model_copy(update={"model": model})


def _explain(tree: Any, item: Any) -> str:
    path: list[str] = []
    node = section = tree
    for part in item["loc"]:
        if (isinstance(node, dict) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            section, node = node, node[part]
        path.append(str(part))
    key = ".".join(path)
    kind, message = item["type"], item["msg"]
    if kind == "extra_forbidden":
        known = _known(path[:-1], tree)
        if named := foreign.hints(key, item["input"]):
            return f"{key}: no such key; {'; '.join(named)}"
        near = difflib.get_close_matches(path[-1], known, 1, 0.6)
        elsewhere = "" if near or len(path) > 1 else _elsewhere(key)
        hint = f"; did you mean {'.'.join(path[:-1] + near)}?" if near else elsewhere
        tag = {"algo": "name", "reward": "type"}.get(path[0], "")
        owner = tree["rollout"].get("engine", "hf") if path[:2] == ["rollout", "options"] else section.get(tag)
        if owner and not near:
            hint = f"; {owner} has {', '.join(k for k in known if k != tag) or 'no settings'}"
        of = f" ({owner})" if near and is_place(str(owner)) else ""
        return f"{key}: no such key{hint}{of}"
    if kind == "missing":
        own = own_class(path, tree)
        return f"{key}: missing" + (f"; {own} needs it: {key}=VALUE" if own else "")
    if kind == "value_error":
        return (f"{key}: " if key else "") + message.removeprefix("Value error, ")
    return f"{key}: {message[0].lower()}{message[1:]}, not {item['input']!r}"


def _elsewhere(key: str) -> str:
    """Of a key without its section, where it stands."""
    sections = [name for name, field in Config.model_fields.items() if key in _fields(field.annotation)]
    return f"; did you mean {sections[0]}.{key}?" if sections else ""


def own_class(path: Sequence[str], tree: Any) -> str | None:
    """The user's own class whose setting `path` is, as the configuration names it."""
    section = tree.get(path[0])
    if path[0] == "reward":
        section = section[int(path[1])]
    tag = {"algo": "name", "reward": "type", "rollout": "engine" if "options" in path else ""}.get(path[0], "")
    name = section.get(tag) if isinstance(section, dict) else None
    return name if isinstance(name, str) and is_place(name) else None


def _known(path: list[str], tree: Any) -> list[str]:
    """The keys that the section at `path` knows."""
    model: Any = Config
    for part in path:
        above, tree = tree, tree[int(part)] if isinstance(tree, list) else tree.get(part, {})
        if model is Config and part == "algo":
            model = system_of(tree)
        elif model is RolloutConfig and part == "options":
            model = class_of(above.get("engine", "hf"), ENGINES, SamplerSettings)
        else:
            model = _model_of(model if part.isdigit() else model.model_fields[part].annotation, tree)
        if model is None:
            return []
    return _fields(model)


def _fields(model: Any) -> list[str]:
    return list(getattr(model, "model_fields", ()))


def _model_of(annotation: Any, tree: Any) -> Any:
    """The pydantic model that an annotation stands for, of a reward that of its type."""
    if get_origin(annotation) is list:
        return get_args(annotation)[0]
    if annotation is RewardSettings:
        return settings_class(tree["type"])
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for option in get_args(annotation) if (found := _model_of(option, tree))), None)


def dump(config: Config) -> str:
    """The resolved configuration as YAML, every default spelled out; without a witness, as before there were any."""
    tree = config.model_dump(mode="json", exclude=None if config.witness else {"witness"})
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
