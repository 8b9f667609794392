"""What may change between a run and its resumption."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dualign import config as configs
from dualign.annotate import Reward
from dualign.annotate.function import name_of
from dualign.annotate.settings import RewardSettings
from dualign.assets import EMBEDDED
from dualign.common.errors import UserError
from dualign.common.named import is_place, same_name
from dualign.common.paths import path_of
from dualign.config import Config
from dualign.models.tokenizer import Tokenizer
from dualign.run import digests
from dualign.run.batch import update_rows
from dualign.run.digests import Digests
from dualign.run.folder import Run
from dualign.run.named import pinned
from dualign.training.source import Source

ALLOWED = (  # none of these changes a number that is already in the folder
    "train.online_batches",
    "train.micro_batch_tokens",
    "train.compile",
    "train.shard",
    "train.max_absent",
    "run.preview",
    "rollout.max_sampler_gap",
    "eval.every",
    "run.checkpoints",
    "run.keep_last",
    "run.trackers",
    "run.project",
    "witness.stop",
)


def resumed_config(folder: Path, overrides: Iterable[str]) -> Config:
    """The run's own configuration with overrides. Raises UserError for a key that may not change any more."""
    run = Run.open(folder)
    run.check(run.config_file, "A run's configuration is changed by overrides: dualign resume RUN key.sub=value")
    config = configs.load(run.config_file, overrides)
    config = pinned(config.model_copy(update={"run": config.run.model_copy(update={"dir": str(folder)})}))
    check_changes(run, config)
    return config


def check_changes(run: Run, config: Config) -> None:
    """Raises UserError, by name, for a key of `config` that may not differ from the run's own."""
    stored = _stored(run, config)
    witnesses = config.witness.reward if config.witness else []
    sampling = [f"rollout.options.{name}" for name in sorted(config.rollout.options.ASKING)]
    allowed = [*ALLOWED, *sampling, *asking(config.reward, "reward"), *asking(witnesses, "witness.reward")]
    for key, (old, new) in configs.differences(stored, config).items():
        may = key == "run.dir" or any(key == each or key.startswith(f"{each}.") for each in allowed)
        if not may and not _moved(run, config, key, str(old), str(new)):
            raise UserError(
                f"{key} cannot change on resume: what is stored was made with its old value. These can: {', '.join(allowed)}"
            )
        if key == "train.online_batches" and stored.train.falling:
            raise UserError(
                "train.online_batches cannot change on resume where train.decay or train.schedule lets the rate fall: the rates "
                "of the updates that are done depend on it"
            )


def _stored(run: Run, config: Config) -> Config:
    """The run's own configuration. Code of the user's own is loaded from where `config` has it, if that is elsewhere:
    whether it is the same, its digest says."""
    tree, path = configs.read(run.config_file)
    own = [(tree.get("algo"), "name", config.algo.name), (tree.get("rollout"), "engine", config.rollout.engine)]
    own += [(held, "type", r.type) for held, r in _beside(tree.get("reward", ()), config.reward)]
    for held, key, now in own:
        if isinstance(held, dict) and same_name(held.get(key), now):
            held[key] = now
    return configs.build(tree, str(path), stored=True)


def asking(rewards: Sequence[RewardSettings], key: str) -> Iterator[str]:
    """The settings of rewards, and of what they are made of, that change no label."""
    for i, reward in enumerate(rewards):
        yield from (f"{key}.{i}.{name}" for name in sorted(reward.ASKING))
        yield from asking(reward.member_rewards, f"{key}.{i}.of")


def _beside(tree: Any, rewards: Sequence[RewardSettings]) -> Iterator[tuple[Any, RewardSettings]]:
    """Rewards as they are written, and those that they are now; what they are made of, too."""
    for held, reward in zip(tree, rewards, strict=False):
        yield held, reward
        if isinstance(held, dict) and isinstance(held.get("of"), list):
            yield from _beside(held["of"], reward.member_rewards)


def _moved(run: Run, config: Config, key: str, old: str, new: str) -> bool:
    """Whether `key` names another place of what the run was made from. (In a file of code, the same name.)"""
    then: Digests = (run.about.get("inputs") or {}).get(key) or {}
    now = digests.of_run(config).get(key) or {} if then else {}
    named = not (is_place(old) and is_place(new)) or same_name(old, new)
    return bool(then and now) and named and digests.changed(then, now) is None


@dataclass(frozen=True)
class Changes:
    """What a resume finds changed and may continue with: rewards that were to be fixed, by their keys in `inputs`."""

    mended: tuple[str, ...] = ()
    inputs: dict[str, Digests] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # for people

    def record(self, run: Run) -> None:
        """In run.json: from here on the fixed rewards are the run's own, and no others may take their place."""
        about = run.about
        if self.mended:
            batches = len(run.steps())
            mended = [*about.get("mended", []), {"inputs": list(self.mended), "batches": batches}]
            run.note(inputs=about["inputs"] | self.inputs, mended=mended, mending=False)
        elif about.get("mending"):
            run.note(mending=False)


def told(mended: Mapping[str, Any]) -> str:
    return f"{', '.join(mended['inputs'])} changed after {mended['batches']} online batches"


def check_same_run(folder: Path, config: Config, given: Sequence[Reward], sampler: Any = None) -> Changes:
    """What has changed since the run in `folder` began, as far as it can be resumed. Raises UserError where it cannot, by
    `config` and with these rewards and this sampler from Python: another reward, sampler, model or data than before
    would make a run of two kinds."""
    run = Run.open(folder)
    had, names = run.functions, [name_of(reward) for reward in given]
    if had is not None and had != names:
        raise UserError(
            f"{folder}: its rewards came from Python: {', '.join(had) or 'none'}, now {', '.join(names) or 'none'}. "
            "Resume with the same ones: dualign.train(config, reward=[...], resume=True); a recipe that names its rewards "
            "is resumed from the command line"
        )
    if run.about.get("sampler") != sampler_name(sampler):
        raise UserError(
            f"{folder}: its sampler came from {run.about.get('sampler') or 'rollout.engine'}, now from "
            f"{sampler_name(sampler) or 'rollout.engine'}. Resume with the same one: "
            "dualign.train(config, sampler=..., resume=True)"
        )
    check_changes(run, config)
    _check_models(run, config)
    return check_inputs(run, digests.of_run(config, given))


def _check_models(run: Run, config: Config) -> None:
    """Raises UserError where a folder that a model came from is gone: another run's checkpoint, say."""
    then, m = run.about.get("inputs") or {}, config.model
    for key, name in (("model.name", m.name), ("model.reference", m.reference)):
        files = then.get(key) or {}
        if name and files and "commit" not in files and name not in EMBEDDED and not path_of(name).is_dir():
            raise UserError(
                f"{run.folder}: {key}: {name} is gone, and the run was made from it. Put it back, or name a copy of it: "
                f"dualign resume {run.folder} {key}=/its/place"
            )


def sampler_name(sampler: Any) -> str | None:
    """What run.json calls a sampler that Python gave."""
    return None if sampler is None else f"{type(sampler).__module__}.{type(sampler).__qualname__}"


def check_inputs(run: Run, now: dict[str, Digests]) -> Changes:
    """The same of what the run is made from. A reward may have changed where it stopped the run to be fixed."""
    then = run.about.get("inputs")
    if not isinstance(then, dict):
        note = "note: this run does not say what it was made from: nobody can tell whether its model, data or rewards changed"
        return Changes(notes=(note,))
    found = {key: words for key in now if (words := digests.changed(then.get(key) or {}, now[key]))}
    mending = bool(run.about.get("mending"))
    if refused := {key: words for key, words in found.items() if not (mending and key.startswith("reward"))}:
        raise UserError(
            f"{run.folder}: {'; '.join(f'{key}: {words}' for key, words in refused.items())}. What is stored was made with "
            "what was there before: put that back and resume, or begin a new run"
        )
    notes = tuple(
        f"note: {key}: {words}; it was to be fixed, and the run continues with it" for key, words in found.items()
    )
    return Changes(tuple(found), {key: now[key] for key in found}, notes)


def check_stored(run: Run, config: Config, source: Source, tokenizer: Tokenizer, step: int, update: int) -> None:
    """Raises UserError where training cannot resume after `update` updates of online batch `step` from what is stored."""
    _check_trained_on(run, config, step, update)
    _check_tokens(run, source, tokenizer)


def _check_trained_on(run: Run, config: Config, step: int, update: int) -> None:
    """The batch, and the earlier ones' uses in it that were trained on already, must be there: only the policy of before
    could make them again."""
    done = 0
    for of in (step, *(step - age for age in config.train.reuse if age <= step)):
        if done >= update:
            return
        use = run.read_batch(step) if of == step else run.read_reused(step, of)
        if use is None:
            path = run.batch_path(step) if of == step else run.reused_path(step, of)
            raise UserError(
                f"{path}: missing, and {run.resumable()} is past the policy that made it. Delete that checkpoint and resume: "
                "training resumes from an earlier state, and makes it again"
            )
        done += sum(1 for _ in update_rows(use, config.algo, config.train.update_size, config.run.seed))


def _check_tokens(run: Run, source: Source, tokenizer: Tokenizer) -> None:
    """Raises UserError where the last batch that is stored would not be made of the same prompts (and, from a fixed set,
    completions) now."""
    steps = run.steps()
    b = run.read_batch(max(steps)) if steps else None
    if b is None:
        return
    known = source.known(b.step)
    for row in b.rows:
        r = row.rollout
        prompt_ids, completions = known[r.group] if r.group < len(known) else ((), [])
        pairs = [("prompt", r.prompt_ids, prompt_ids)]
        if completions:
            pairs.append(("completion of prompt", r.completion_ids, completions[r.index % len(completions)]))
        for what, then, now in pairs:
            if then != now:
                dated = "; its chat template writes the date" if "strftime" in str(tokenizer.hf.chat_template) else ""
                raise UserError(
                    f"{run.batch_path(b.step)}: {what} {r.prompt.id} is not tokenized as it was when the batch was "
                    f"made{dated}. Then: {_beginning(tokenizer, then)} Now: {_beginning(tokenizer, now)} "
                    "Resume with the data, the template and the versions of packages that the run began with (run.json)"
                )


def _beginning(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    text = tokenizer.hf.decode(list(ids)) if ids else "none"
    return repr(text if len(text) <= 200 else f"{text[:200]}...")


def note_fetched(run: Run, config: Config) -> None:
    """Digests of what a reward has only fetched now: a classifier of a hub."""
    then = run.about.get("inputs") or {}
    lacking = {key for key in then if key.startswith("reward.") and not then[key]}
    if lacking:
        now = digests.of_rewards(config.reward)
        run.note(inputs=then | {key: now[key] for key in lacking & now.keys()})
