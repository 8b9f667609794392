"""`--dry-run`: what a recipe would do, need and cost, without loading a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from dualign import assets, data
from dualign.common.errors import UserError
from dualign.config import Config
from dualign.models.load import context_of
from dualign.models.tokenizer import Tokenizer, load_tokenizer, source_of
from dualign.training.source import load_heldout, load_stream


def parameters_of(config: Config, key: Literal["name", "reference"] = "name") -> tuple[int, Any]:
    """Parameter count and configuration of model.name or model.reference, from its config alone (on the meta device); of
    an adapter, its base's."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    m = config.model
    given, revision = (m.name, m.revision) if key == "name" else (m.reference or "", m.reference_revision)
    name = assets.resolve(given)
    if (adapter := assets.adapter_of(name, revision)) is not None:
        name, revision = adapter.base, adapter.base_revision
    try:
        hf = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.{key}: {given} cannot be found: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(hf)
    return sum(p.numel() for p in model.parameters()), hf


def memory_estimate(config: Config, count: int, hf: Any) -> dict[str, float]:
    """GB by part, for one process with full fine-tuning; activations are an upper estimate."""
    text = hf.get_text_config()
    half = 2 if config.model.precision == "bf16" else 4
    copies = {"policy (fp32) and gradients": 8 * count, "rounded copy that samples": half * count if half == 2 else 0}
    if (config.algo.needs_ref or config.data.eval) and (config.model.reference or config.model.lora is None):
        copies["π_0"] = half * (parameters_of(config, "reference")[0] if config.model.reference else count)
    if config.train.optimizer == "adamw":
        copies["AdamW moments"] = 8 * count
    if config.algo.critic:
        copies["value model, gradients"] = 8 * count
    per_token = text.num_hidden_layers * (18 * text.hidden_size + 4 * text.intermediate_size) * half
    copies["activations of a micro-batch"] = config.train.micro_batch_tokens * per_token
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    rows = min(getattr(config.rollout.options, "decode_batch_size", 0), config.train.online_batch)
    cache = rows * (config.rollout.max_new_tokens + 256) * heads * size * 2 * half * text.num_hidden_layers
    copies["key-value cache"] = cache if config.algo.source == "online" else 0
    return {name: size / 1e9 for name, size in copies.items() if size}


def print_plan(config: Config) -> None:
    t, c = config.train, config
    per = c.updates_per_batch
    print(f"{c.algo.name}: {c.algo.model_dump(exclude={'name'})}")
    try:
        count, hf = parameters_of(config)
    except UserError as error:
        print(f"model: {c.model.name} (not at hand here, sizes unknown: {error})")
    else:
        print(f"model: {c.model.name}, {count / 1e6:.0f}M parameters, {c.model.precision}")
        estimate = memory_estimate(config, count, hf)
        print(
            f"memory, about: {sum(estimate.values()):.1f} GB = "
            + " + ".join(f"{v:.2f} {k}" for k, v in estimate.items())
        )
    faults: list[str] = []
    reader = _reader(c)
    train = _count(lambda say: load_stream(c, reader, say) if reader else _rows(c), c.data.train, faults)
    if train:
        epochs = t.online_batches * c.prompts_per_batch / train
        print(f"data: {_most(c, reader)}{train} rows of {c.data.train}; {epochs:.2f} epochs")
    held = 0
    if c.data.eval:
        held = _count(
            lambda say: load_heldout(c, reader, say, bool(c.reward)) if reader else _held(c), c.data.eval, faults
        )
        if held:
            print(f"held out: {_most(c, reader)}{held} rows of {c.data.eval}, drawn")
    print(
        f"{t.online_batches} online batches of {t.online_batch} completions = {c.prompts_per_batch} prompts × {c.group}; "
        f"{per} updates each, on {c.update_completions} completions; {t.online_batches * per} updates in all"
    )
    labels, evaluated = c.labels
    evaluated = evaluated // c.eval.prompts * (held or c.eval.prompts)
    print(f"labels needed: {labels} to train, {evaluated} to evaluate")
    if told := c.rollout.options.describe():
        print(f"sampler: {told}")
    try:
        c.rollout.options.check()
    except UserError as error:
        faults.append(str(error))
    for i, reward in enumerate(c.reward):
        print(f"reward.{i}: {reward.describe(labels + evaluated)}")
        try:
            reward.check()
        except UserError as error:
            faults.append(f"reward.{i}: {error}")
    if (Path(c.run.dir) / "config.yaml").exists():
        faults.append(f"run.dir: {c.run.dir} already holds a run")
    faults += [f"run.trackers: {name} is not installed" for name in c.run.trackers if find_spec(name) is None]
    if faults:
        raise UserError("this would not run:\n" + "\n".join(f"  {fault}" for fault in faults))


@dataclass(frozen=True)
class _Reader:
    """The model's tokenizer and context, without its weights."""

    tokenizer: Tokenizer
    context: int


def _reader(config: Config) -> _Reader | None:
    """What tells which rows a run will leave out; None where none can be, or the model is not at hand."""
    if not _leaves_out(config):
        return None
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


def _count(load: Callable[[Callable[[str], None]], Sequence[Any]], source: str, faults: list[str]) -> int:
    """How many rows of `source` a run uses; 0 where it cannot be read. What is there and wrong is a fault; what is not
    there (a file that is still to come, a data set on a hub) is only told."""
    try:
        return len(load(print))
    except UserError as error:
        if Path(source).exists() or source.startswith("builtin:"):
            faults.append(f"data: {error}")
        else:
            print(f"data: NOT HERE, the run needs it: {error}")
    return 0
