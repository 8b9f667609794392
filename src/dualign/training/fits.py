"""Whether a run fits the GPUs that it is planned for, said in a table, and what would make it fit."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dualign.common.cpu import bf16_units
from dualign.common.errors import UserError
from dualign.config import Config, four_bits_whole
from dualign.models.architectures import Sizes, on_meta
from dualign.models.settings import LoraConfig
from dualign.training.memory import PROMPT, Memory, Parts, Place

GB = 1e9
MOST = 64  # GPUs that are proposed
Change = tuple[str, Any]  # a key and the value to set it to


class NotAtHand(UserError):
    """A model whose shape is not known here."""


@dataclass(frozen=True)
class Asked:
    """GPUs in all, on so many nodes, with so many GB each. None: what this machine has."""

    gpus: int | None = None
    nodes: int = 1
    memory: float | None = None

    def place(self) -> Place:
        """Raises UserError for GPUs that are no whole number for each node."""
        gpus = self.gpus or (self.nodes if self.nodes > 1 or self.memory else None)
        if gpus is None:
            on_gpu = torch.cuda.is_available()
            return Place(device="cuda" if on_gpu else "cpu", laid_out=not on_gpu and bf16_units())
        if gpus % self.nodes:
            near = max(1, gpus // self.nodes) * self.nodes
            raise UserError(
                f"--gpus {gpus} --nodes {self.nodes}: {gpus} GPUs are no whole number for each node; --gpus counts those of "
                f"all nodes, for example --gpus {near}"
            )
        return Place(gpus, self.nodes)

    def limit(self, place: Place) -> float | None:
        """Bytes that a process may take: as given, or the least that a GPU of this machine has."""
        if self.memory:
            return self.memory * GB
        if place.device == "cpu":
            return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        return min(map(float, _gpus()), default=None)


def _gpus() -> list[int]:
    """Bytes of this machine's GPUs."""
    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


class Predicted(NamedTuple):
    """What to print of a run's model and memory; where the GPUs' memory was given, the fault of not fitting it; and for
    programs, in bytes of each process. `fits`: null where no limit is known."""

    lines: list[str]
    fault: str | None
    record: dict[str, Any]


def predict(config: Config, asked: Asked, prompt: int | None = None) -> Predicted:
    """`prompt`: tokens of a long one, where some were read. Raises UserError for GPUs that cannot be, NotAtHand for a model whose
    sizes are not known."""
    place = asked.place()
    limit = asked.limit(place)
    memory, notes = memory_of(config, place, prompt, limit)
    phases = memory.phases()
    count, m = memory.sizes.parameters, config.model
    lines = [f"model: {m.name}, {count / 1e6:.0f}M parameters, {m.precision}", *notes, *_of_processes(config, place)]
    where = f"on each of {place.processes} GPUs" if place.processes > 1 else "on the GPU"
    where = where if place.device == "cuda" else "in memory"
    long = f"prompts of {memory.prompt} tokens" + ("" if prompt else ", assumed")
    lines.append(f"GB {where}, predicted for {long} (docs/scale.md):")
    lines += [f"  {line}" for line in table(phases)]
    if place.device == "cuda":
        lines.append(f"the host's memory: about {memory.host() / GB:.0f} GB on each node")
    verdict, fits = _verdict(memory, phases, limit)
    lines.append(verdict)
    record = {
        "parameters": count, "processes": place.processes, "device": place.device, "prompt_tokens": memory.prompt,
        "phases": phases, "peak": peak(phases)[0], "limit": limit, "fits": None if limit is None else fits,
    }  # fmt: skip
    return Predicted(lines, None if fits or not asked.memory else verdict, record)


def memory_of(
    config: Config, place: Place, prompt: int | None = None, limit: float | None = None
) -> tuple[Memory, list[str]]:
    """The memory of a run there, and what a person should know of where its sizes are from. Raises NotAtHand."""
    from transformers import AutoModelForCausalLM

    m, notes = config.model, []
    targets = m.lora.target_modules if m.lora else "all-linear"

    def sizes(key: str, name: str, revision: str | None) -> Sizes:
        try:
            model, note = on_meta(AutoModelForCausalLM, name, revision, m.trust_remote_code)
        except UserError as error:
            raise NotAtHand(f"{key}: {error}") from None
        if note:
            notes.append(f"note: {key}: {name}: {note}")
        return Sizes.of(model, targets)

    policy = sizes("model.name", m.name, m.revision)
    reference = sizes("model.reference", m.reference, m.reference_revision) if m.reference else None
    reward = (0.0, 0.0)
    for i, each in enumerate(config.reward):
        try:
            here, host = each.weights_held()
            served = getattr(each, "gpu_share", 0.0) * (limit or 0.0)
            reward = reward[0] + here + served, reward[1] + host
        except UserError as error:
            notes.append(f"note: reward.{i}: its memory is not counted: {error}")
    prompt = prompt or config.data.max_prompt_tokens or PROMPT
    return Memory(config, policy, place, reference, reward, prompt, limit), notes


def table(phases: dict[str, Parts]) -> list[str]:
    """Phases by parts, in GB."""
    parts = list(dict.fromkeys(part for each in reversed(phases.values()) for part in each))  # what stays comes first
    rows = [["", *parts, "all"]]
    for phase, each in phases.items():
        cells = [f"{each[part] / GB:.2f}" if part in each else "" for part in parts]
        rows.append([phase, *cells, f"{sum(each.values()) / GB:.2f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]


def peak(phases: dict[str, Parts]) -> tuple[float, str]:
    """Bytes, and the phase that needs them."""
    return max((sum(parts.values()), phase) for phase, parts in phases.items())


def _of_processes(config: Config, place: Place) -> list[str]:
    """What is odd about so many processes, in words."""
    notes, n, prompts = [], place.processes, config.prompts_per_batch
    if config.algo.source == "online" and n > prompts:
        notes.append(f"note: {n} processes share {prompts} prompts of an online batch: {n - prompts} sample nothing")
    elif config.algo.source == "online" and prompts % n:
        notes.append(f"note: {prompts} prompts on {n} processes: some sample one more than others, which wait")
    shard = config.train.shard
    if shard == "hybrid" and place.nodes == 1 and n > 1:
        notes.append("note: train.shard=hybrid on one node is train.shard=full")
    if shard != "none" and n == 1:
        notes.append(
            f"note: train.shard={shard} on one process saves nothing, and samples from a copy: none takes less"
        )
    if place.device == "cuda" and len(set(_gpus())) > 1:
        sizes = ", ".join(f"{size / GB:.0f}" for size in _gpus())
        notes.append(
            f"note: this machine's GPUs differ ({sizes} GB): a run takes those of one kind (CUDA_VISIBLE_DEVICES)"
        )
    return notes


def _verdict(memory: Memory, phases: dict[str, Parts], limit: float | None) -> tuple[str, bool]:
    """In words; whether it fits, as far as that is known."""
    needs, phase = peak(phases)
    if limit is None:
        return f"peak {needs / GB:.1f} GB in {phase}; --gpu-memory 80 says whether that fits 80 GB", True
    on = f"on {limit / GB:.0f} GB"
    if needs <= limit:
        return f"fits {on}: peak {needs / GB:.1f} GB in {phase}", True
    said = f"does not fit {on}: needs {needs / GB:.1f} GB in {phase}"
    return f"{said}; {remedy(memory, limit) or 'and no setting known here makes it fit'}", False


def remedy(memory: Memory, limit: float) -> str | None:
    """The fewest settings with which a run fits, those that change no number first; else more GPUs. Each is tried."""
    for changes in _few(_changes(memory.config, memory.place)):
        changed = replace(memory, config=_with(memory.config, changes))
        if four_bits_whole(changed.config) and (needs := peak(changed.phases())[0]) <= limit:
            return f"set {' '.join(f'{key}={_text(value)}' for key, value in changes)} ({needs / GB:.1f} GB)"
    gpus = 2 ** (math.floor(math.log2(memory.place.processes)) + 1)
    while memory.place.device == "cuda" and gpus <= MOST:
        place = replace(memory.place, processes=gpus, nodes=max(memory.place.nodes, gpus // 8))
        changed = replace(memory, place=place, config=_with(memory.config, [("train.shard", "full")]))
        if (needs := peak(changed.phases())[0]) <= limit:
            return f"take {gpus} GPUs and train.shard=full ({needs / GB:.1f} GB)"
        gpus *= 2
    return None


def _changes(config: Config, place: Place) -> list[Change]:
    t, changes = config.train, list[Change]()
    if not config.model.gradient_checkpointing:
        changes.append(("model.gradient_checkpointing", True))
    if place.processes > 1 and t.shard != "full":
        changes += [("train.shard", "hybrid")] * (place.nodes > 1) + [("train.shard", "full")]
    if place.processes == 1 and t.shard != "none":
        changes.append(("train.shard", "none"))
    changes += [("train.micro_batch_tokens", n) for n in (2048, 1024) if n < t.micro_batch_tokens]
    rows = getattr(config.rollout.options, "decode_batch_size", 0)
    changes += [("rollout.options.decode_batch_size", n) for n in (64, 16) if n < rows]
    if t.optimizer == "adamw":
        changes.append(("train.optimizer", "adafactor"))
    lora = config.model.lora
    if lora is None:
        changes.append(("model.lora", LoraConfig()))
    if not (lora and lora.quantize):
        changes.append(("model.lora", (lora or LoraConfig()).model_copy(update={"quantize": "nf4"})))
    return changes


def _few(changes: Sequence[Change]) -> Iterator[Sequence[Change]]:
    """Up to four of them at once, no key twice."""
    for count in (1, 2, 3, 4):
        for some in itertools.combinations(changes, count):
            if len({key for key, _ in some}) == count:
                yield some


def _with(config: Any, changes: Sequence[Change]) -> Any:
    for key, value in changes:
        first, _, below = key.partition(".")
        inner = _with(getattr(config, first), [(below, value)]) if below else value
        config = config.model_copy(update={first: inner})
    return config


def _text(value: Any) -> str:
    """As an override that a shell takes."""
    if not isinstance(value, LoraConfig):
        return str(value).lower()
    changed = [f"{key}: {given}" for key, given in value.model_dump(exclude_defaults=True).items()]
    return f"'{{{', '.join(changed)}}}'" if changed else "{}"
