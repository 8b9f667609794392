"""`--dry-run`: what a recipe would do, need and cost, without loading a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dualign import assets, data
from dualign.annotate import NO_REWARD, ONLY_GATES
from dualign.annotate.settings import RewardSettings
from dualign.common.errors import UserError
from dualign.common.types import Prompt, text_of
from dualign.config import Config
from dualign.models.load import context_of
from dualign.models.tokenizer import Tokenizer, load_tokenizer, source_of
from dualign.rollout.base import Request
from dualign.rollout.requests import requests_of
from dualign.run.named import pinned
from dualign.run.witness import most_labels
from dualign.training.evaluations import in_both
from dualign.training.fits import Asked, NotAtHand, predict
from dualign.training.source import load_heldout, load_stream, mention_plain_text

LOOKED_AT = 500  # prompts whose tokens are counted
Say = Callable[[str], None]


def print_plan(config: Config, gpus: int | None = None, nodes: int = 1, gpu_memory: float | None = None) -> None:
    """Tells what a run would do. `gpus`: in all, on so many nodes, each with `gpu_memory` GB; None: this machine. Raises
    UserError for what would not run; what does not fit is such where its memory was given."""
    refuse(make_plan(config, gpus, nodes, gpu_memory, print)["faults"])


def refuse(faults: Sequence[str]) -> None:
    if faults:
        raise UserError("this would not run:\n" + "\n".join(f"  {fault}" for fault in faults))


def make_plan(config: Config, gpus: int | None, nodes: int, gpu_memory: float | None, say: Say) -> dict[str, Any]:
    """The plan as `print_plan` has it, told line by line, and returned for programs, with its `faults`."""
    config = c = pinned(config)
    t, per, faults = c.train, c.updates_per_batch, list[str]()
    say(f"{c.algo.name}: {c.algo.model_dump(exclude={'name'})}")
    reader = _reader(c)
    leaver = reader if _leaves_out(c) else None
    rows = _load(lambda told: load_stream(c, leaver, told) if leaver else _rows(c), c.data.train, faults, say)
    memory = _memory(c, Asked(gpus, nodes, gpu_memory), _longest(rows, reader), faults, say)
    if train := len(rows):
        epochs = t.online_batches * c.prompts_per_batch / train
        say(f"data: {_most(c, leaver)}{train} rows of {c.data.train}; {epochs:.2f} epochs")
        if reader and not leaver:  # what leaves rows out has said so
            mention_plain_text([getattr(row, "prompt", row) for row in rows], c.data, reader, say)
            faults += _too_long(rows, c, reader, say)
    held = _held_out(c, rows, reader, leaver, faults, say)
    say(
        f"{t.online_batches} online batches of {t.online_batch} completions = {c.prompts_per_batch} prompts × {c.group}; "
        f"{per} updates each, on {c.update_completions} completions; {t.online_batches * per} updates in all"
    )
    labels, evaluated = c.labels
    evaluated = evaluated // c.eval.prompts * (held or c.eval.prompts)
    say(f"labels needed: {labels} to train, {evaluated} to evaluate")
    if told := c.rollout.options.describe():
        say(f"sampler: {told}")
    try:
        c.rollout.options.check()
    except UserError as error:
        faults.append(str(error))
    asked = [(f"reward.{i}", reward.of_groups(c.group), labels + evaluated) for i, reward in enumerate(c.reward)]
    faults += [NO_REWARD] if c.algo.source == "online" and not c.reward else []
    faults += [ONLY_GATES] if c.reward and all(reward.gate for reward in c.reward) else []
    wanted = most_labels(c, c.witness, held) if c.witness else 0
    asked += [(f"witness.reward.{i}", reward, wanted) for i, reward in enumerate(c.witness.reward if c.witness else ())]
    if c.witness:
        say(f"witness: at most {wanted} labels")
    for key, reward, count in asked:
        _check(key, reward, count, faults, say)
    if (Path(c.run.dir) / "config.yaml").exists():
        faults.append(f"run.dir: {c.run.dir} already holds a run")
    faults += [f"run.trackers: {name} is not installed" for name in c.run.trackers if find_spec(name) is None]
    return {
        "algo": c.algo.model_dump(), "model": c.model.name, "precision": c.model.precision, "memory": memory,
        "rows": train, "held_out": held, "online_batches": t.online_batches, "completions": t.online_batch,
        "updates": t.online_batches * per, "labels": {"train": labels, "evaluate": evaluated, "witness": wanted},
        "dollars": {key: reward.dollars(count) for key, reward, count in asked}, "faults": list(dict.fromkeys(faults)),
    }  # fmt: skip


def _memory(c: Config, asked: Asked, prompt: int | None, faults: list[str], say: Say) -> dict[str, Any] | None:
    """None: the model is not at hand."""
    try:
        found = predict(c, asked, prompt)
    except NotAtHand as error:
        say(f"model: {c.model.name} (not at hand here, sizes unknown: {error})")
        return None
    say("\n".join(found.lines))
    faults += [found.fault] if found.fault else []
    return found.record


def _held_out(
    c: Config,
    rows: Sequence[Any],
    reader: _Reader | None,
    leaver: _Reader | None,
    faults: list[str],
    say: Say,
) -> int:
    """How many rows evaluations have."""
    if not c.data.eval:
        return 0
    drawn = _load(
        lambda told: load_heldout(c, leaver, told, bool(c.reward)) if leaver else _held(c), c.data.eval, faults, say
    )
    if drawn:
        say(
            "\n".join([f"held out: {_most(c, leaver)}{len(drawn)} rows of {c.data.eval}, drawn", *in_both(rows, drawn)])
        )
        sampled = c.algo.source == "online" or c.reward  # else held-out completions are the set's own
        faults += _too_long(drawn, c, reader, say) if sampled and reader and not leaver else []
    return len(drawn)


def _check(key: str, reward: RewardSettings, labels: int, faults: list[str], say: Say) -> None:
    say(f"{key}: {reward.describe(labels)}")
    try:
        reward.check()
    except UserError as error:
        faults.append(f"{key}: {error}")


@dataclass(frozen=True)
class _Reader:
    """The model's tokenizer and context, without its weights."""

    tokenizer: Tokenizer
    context: int


def _reader(config: Config) -> _Reader | None:
    """What reads rows as the run will; None where the model is not at hand."""
    from transformers import AutoConfig, GenerationConfig

    try:
        name, source = source_of(config.model)
        if (adapter := assets.adapter_of(name, config.model.revision)) is not None:
            name, source = adapter.base, source | {"revision": adapter.base_revision}
        hf: Any = AutoConfig.from_pretrained(name, **source)
        try:
            generation = GenerationConfig.from_pretrained(name, **source)
        except OSError:
            generation = GenerationConfig.from_model_config(hf)
        embedding = SimpleNamespace(weight=range(hf.get_text_config().vocab_size))
        told = SimpleNamespace(generation_config=generation, get_input_embeddings=lambda: embedding)
        tokenizer = load_tokenizer(config.model, told)
    except (OSError, ValueError, UserError):
        return None
    return _Reader(tokenizer, context_of(hf))


def _leaves_out(config: Config) -> bool:
    return config.data.max_prompt_tokens is not None or config.data.bad_rows == "skip"


def _most(config: Config, reader: _Reader | None) -> str:
    return "at most " if reader is None and _leaves_out(config) else ""


def _rows(c: Config) -> Sequence[Any]:
    return (data.load_prompts if c.algo.source == "online" else data.load_examples)(c.data.train, c.data, c.data.split)


def _held(c: Config) -> Sequence[Any]:
    assert c.data.eval is not None
    prompts = data.load_prompts(c.data.eval, c.data, c.data.eval_split)  # of pairs and demonstrations, as many rows
    return data.draw(prompts, c.eval.prompts)


def _load(load: Callable[[Say], Sequence[Any]], source: str, faults: list[str], say: Say) -> Sequence[Any]:
    """The rows of `source` that a run uses; none where it cannot be read. What is there and wrong is a fault; what is not
    there (a file that is still to come, a data set on a hub) is only told."""
    try:
        return load(say)
    except UserError as error:
        if Path(source).exists() or source.startswith("builtin:"):
            faults.append(f"data: {error}")
        else:
            say(f"data: NOT HERE, the run needs it: {error}")
    return ()


def _longest(rows: Sequence[Any], reader: _Reader | None) -> int | None:
    """Tokens of the longest of some prompts; None where there are none to be read."""
    lengths: list[int] = []
    for row in rows[:: max(1, len(rows) // LOOKED_AT)] if reader else ():
        if isinstance(row, Request):
            lengths.append(len(row.prompt_ids))
        elif isinstance(row, Prompt) and reader:
            with suppress(UserError):  # a row that a run refuses, which is not asked here
                lengths.append(len(reader.tokenizer.prompt(row)))
    return max(lengths, default=None)


def _too_long(rows: Sequence[Any], c: Config, reader: _Reader, say: Say) -> list[str]:
    """What a run says of the longest prompt that it samples for, by its characters: to count everyone's tokens takes long."""
    prompts = [row for row in rows if isinstance(row, Prompt)]
    if not prompts:
        return []
    longest = max(prompts, key=lambda prompt: sum(len(text_of(message)) for message in prompt.messages))
    try:
        requests_of([longest], reader.tokenizer, reader.context, c.rollout.max_new_tokens, None, say)
    except UserError as error:
        return [f"data: {error}"]
    return []
