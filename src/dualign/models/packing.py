"""From rows of token ids to micro-batches: hardly any padding, each prompt once, only scored positions.

A micro-batch is one flat run of tokens: prompt, its completions, next prompt, its completions, ..., and a filler.
Everything that works token by token (most of a transformer) sees no other padding; attention alone needs to know who
sees whom, which is what `Layout` says and attention.py reads.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

X = TypeVar("X")
MULTIPLE = 64  # flat lengths are multiples of this: fewer sizes of tensors to allocate and of kernels to prepare


@dataclass(frozen=True)
class Tokens:
    """Token ids of N rows; rows of one group have equal prompt_ids."""

    prompt_ids: tuple[tuple[int, ...], ...]
    completion_ids: tuple[tuple[int, ...], ...]
    group: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.completion_ids)

    def select(self, rows: Sequence[int]) -> Tokens:
        def pick(items: tuple) -> tuple:
            return tuple(items[i] for i in rows)

        return Tokens(pick(self.prompt_ids), pick(self.completion_ids), pick(self.group))

    @property
    def width(self) -> int:
        """T: tokens of the longest completion."""
        return max((len(c) for c in self.completion_ids), default=0)


@dataclass(frozen=True)
class Layout:
    """Where the flat tokens stand in padded blocks. P prompts of at most A tokens, n completions of at most C."""

    prompt_PA: Tensor  # flat position of each prompt token; padding repeats the first
    spread: Tensor  # the flat positions of both kinds of blocks, one after the other
    prompt_mask: Tensor  # (P, 1, A, A) bool: causal
    row_nC: Tensor  # flat position of each completion token; padding repeats the first
    row_prompt_n: Tensor  # which prompt a completion answers
    row_mask: Tensor  # (n, 1, C, A + C) bool: the prompt and what came before
    back_L: Tensor  # for each flat token its place in [prompts (P*A), completions (n*C)]


@dataclass(frozen=True)
class Segments:
    """Where prompts and completions end in the flat tokens, for attention that is told so (GPUs). Each is a segment of
    queries; its keys are its own tokens, a completion's also its prompt's: gathered for each layer in turn, so a prompt's
    keys are there once for each of its completions while one layer attends."""

    ends: Tensor  # int32, cumulative, from 0: of every prompt and completion, and the filler
    key_at: Tensor  # flat positions of the keys, segment after segment
    key_ends: Tensor  # like `ends`, among the keys
    longest: int  # queries of a segment
    key_longest: int


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass needs. L flat tokens (or R padded rows); n completions; M scored tokens."""

    rows: Tensor  # (n,) long, on the CPU: which of the update's rows, in order
    input_ids: Tensor  # (1, L); (R, L) where prompts are not shared
    position_ids: Tensor  # likewise
    layout: Layout | Segments | None  # None: plain padded rows
    mask: Tensor  # plain rows: (R, L) of 0/1; else a stand-in that keeps models from building one
    predictor_M: Tensor  # flat position whose output predicts the token
    target_M: Tensor  # the token
    row_M: Tensor  # its row in the micro-batch, 0..n-1
    step_M: Tensor  # its place in the completion, 0..T-1
    width: int  # T of the result

    def to(self, device: torch.device) -> MicroBatch:
        layout: Any = self.layout and replace(self.layout, **_moved(self.layout, device))
        return replace(self, **_moved(self, device) | {"rows": self.rows, "layout": layout})

    def scatter(self, value_M: Tensor) -> Tensor:
        """(M,) per scored token -> (n, T), 0 elsewhere. Differentiable."""
        out = value_M.new_zeros(len(self.rows), self.width)
        return out.index_put((self.row_M, self.step_M), value_M)


def _moved(record: Any, device: torch.device) -> dict[str, Any]:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    tensors = {k: v for k, v in values.items() if isinstance(v, Tensor)}
    if device.type == "cuda":  # from memory that may move, a copy would wait for all work that is under way
        tensors = {k: v.contiguous().pin_memory() for k, v in tensors.items()}
    return {k: v.to(device, non_blocking=True) for k, v in tensors.items()}


def plan(tokens: Tokens, rows: Sequence[int], budget: int, share: bool = True) -> list[list[int]]:
    """Rows by micro-batch: whole prompts together, at most `budget` tokens each (a prompt that is longer with its
    completions gets a micro-batch to itself). As few micro-batches as will do, of even sizes; where prompts are not
    shared, rows of like lengths together, since padding counts."""
    groups = sorted(_by_prompt(tokens, rows), key=lambda m: -size_of(tokens, m, share))
    if not share:
        batches: list[list[int]] = []
        for members in groups:
            if batches and size_of(tokens, [*batches[-1], *members], share) <= budget:
                batches[-1] += members
            else:
                batches.append(members)
        return batches
    sizes = [size_of(tokens, members, share) for members in groups]
    for count in range(max(1, math.ceil(sum(sizes) / budget)), len(groups) + 1):
        even = _dealt(groups, sizes, count)
        if all(load <= budget for load, parts in even if len(parts) > 1):
            return [[row for members in parts for row in members] for _, parts in even if parts]
    return groups


def size_of(tokens: Tokens, rows: Sequence[int], share: bool) -> int:
    """Tokens that a forward pass over `rows` computes."""
    if not share:
        return len(rows) * max((len(tokens.prompt_ids[r]) + len(tokens.completion_ids[r]) for r in rows), default=0)
    prompts = sum(len(tokens.prompt_ids[members[0]]) for members in _by_prompt(tokens, rows))
    return prompts + sum(len(tokens.completion_ids[row]) for row in rows)


def deal(tokens: Tokens, parts: Sequence[list[int]], world: int, share: bool) -> list[list[list[int]]]:
    """Micro-batches by process."""
    parts = sorted(parts, key=lambda rows: -size_of(tokens, rows, share))
    return [hand for _, hand in _dealt(parts, [size_of(tokens, rows, share) for rows in parts], world)]


def _dealt(items: Sequence[X], sizes: Sequence[int], count: int) -> list[tuple[int, list[X]]]:
    """Items, the largest first, each to the one of `count` hands that holds least so far: (its load, its items)."""
    loads = [(0, i) for i in range(count)]
    hands: list[list[X]] = [[] for _ in range(count)]
    for item, size in zip(items, sizes, strict=True):
        load, i = heapq.heappop(loads)
        hands[i].append(item)
        heapq.heappush(loads, (load + size, i))
    return [(load, hands[i]) for load, i in sorted(loads, key=lambda x: x[1])]


def _by_prompt(tokens: Tokens, rows: Sequence[int]) -> list[list[int]]:
    groups: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        groups[tokens.group[row]].append(row)
    return list(groups.values())


def pack(
    tokens: Tokens, rows: Sequence[int], width: int, pad_id: int, share: bool, segments: bool = False
) -> MicroBatch:
    """The tensors of one micro-batch; `width` is the T of the log-probs it will give. `segments`: the layout that
    attention on GPUs reads."""
    return _flat(tokens, rows, width, segments) if share else _padded(tokens, rows, width, pad_id)


def _flat(tokens: Tokens, rows: Sequence[int], width: int, segments: bool) -> MicroBatch:
    ids: list[int] = []
    prompts: list[range] = []
    completions: list[range] = []
    row_prompt: list[int] = []
    positions: list[range] = []
    for row in rows:
        prompt, completion = tokens.prompt_ids[row], tokens.completion_ids[row]
        if not completions or tokens.group[row] != tokens.group[rows[len(completions) - 1]]:
            prompts.append(range(len(ids), len(ids) + len(prompt)))
            ids += prompt
            positions.append(range(len(prompt)))
        row_prompt.append(len(prompts) - 1)
        completions.append(range(len(ids), len(ids) + len(completion)))
        ids += completion
        positions.append(range(len(prompt), len(prompt) + len(completion)))
    # the first token is predicted at the prompt's end, each further one at its predecessor
    predictor_M = _joined([range(r.start - 1, r.stop - 1) for r in completions])
    first_n = np.cumsum([0, *map(len, completions[:-1])])
    predictor_M[first_n] = torch.tensor([prompts[of][-1] for of in row_prompt])
    if filler := -len(ids) % MULTIPLE:  # a prompt that nothing answers
        prompts.append(range(len(ids), len(ids) + filler))
        ids += ids[:1] * filler
        positions.append(range(filler))
    shape = (prompts, completions, row_prompt)
    return MicroBatch(
        rows=torch.tensor(rows),
        input_ids=_long(ids)[None],
        position_ids=_joined(positions)[None],
        layout=_segments(*shape) if segments else _layout(len(ids), *shape),
        mask=torch.ones(1, 1, 1, 1, dtype=torch.bool),
        predictor_M=predictor_M,
        **_targets(tokens, rows, width),
    )


def _joined(runs: Sequence[range]) -> Tensor:
    """The numbers of all runs, one run after the other."""
    start, length = np.array([(r.start, len(r)) for r in runs]).T
    return torch.from_numpy(np.arange(length.sum()) + np.repeat(start - (np.cumsum(length) - length), length))


def _segments(prompts: list[range], completions: list[range], row_prompt: list[int]) -> Segments:
    keys = [(p.stop, [p]) for p in prompts]
    keys += [(row.stop, [prompts[of], row]) for of, row in zip(row_prompt, completions, strict=True)]
    keys.sort(key=lambda x: x[0])
    sizes = [sum(map(len, seen)) for _, seen in keys]
    return Segments(
        ends=torch.tensor([0, *(end for end, _ in keys)], dtype=torch.int32),
        key_at=_joined([r for _, seen in keys for r in seen]),
        key_ends=torch.tensor([0, *sizes]).cumsum(0).int(),
        longest=max(map(len, [*prompts, *completions])),
        key_longest=max(sizes),
    )


def _layout(length: int, prompts: list[range], completions: list[range], row_prompt: list[int]) -> Layout:
    prompt_PA, row_nC = _block(prompts), _block(completions)
    a, c = prompt_PA.shape[1], row_nC.shape[1]
    prompt_length = torch.tensor([len(p) for p in prompts])
    row_prompt_n = torch.tensor(row_prompt)
    seen = torch.arange(a) < prompt_length[row_prompt_n, None]  # (n, A)
    causal = torch.ones(c, c, dtype=torch.bool).tril()
    row_mask = torch.cat([seen[:, None].expand(-1, c, -1), causal.expand(len(completions), -1, -1)], -1)
    back = torch.empty(length, dtype=torch.long)
    for i, p in enumerate(prompts):
        back[p.start : p.stop] = torch.arange(i * a, i * a + len(p))
    for i, r in enumerate(completions):
        at = len(prompts) * a + i * c
        back[r.start : r.stop] = torch.arange(at, at + len(r))
    causal = torch.ones(a, a, dtype=torch.bool).tril()
    return Layout(
        prompt_PA=prompt_PA,
        spread=torch.cat([prompt_PA.flatten(), row_nC.flatten()]),
        prompt_mask=causal.expand(len(prompts), 1, -1, -1),
        row_nC=row_nC,
        row_prompt_n=row_prompt_n,
        row_mask=row_mask[:, None],
        back_L=back,
    )


def _block(runs: list[range]) -> Tensor:
    """One row per run, padded with its first."""
    start, size = torch.tensor([[r.start, len(r)] for r in runs]).unbind(1)
    place = torch.arange(int(size.max())).expand(len(runs), -1)
    return start[:, None] + place.where(place < size[:, None], 0)


def _padded(tokens: Tokens, rows: Sequence[int], width: int, pad_id: int) -> MicroBatch:
    """Every row with its own prompt, padded on the right: what any model understands."""
    whole = [tokens.prompt_ids[row] + tokens.completion_ids[row] for row in rows]
    length = max(map(len, whole))
    predictors = [
        r * length + len(tokens.prompt_ids[row]) - 1 + t
        for r, row in enumerate(rows)
        for t in range(len(tokens.completion_ids[row]))
    ]
    sizes = torch.tensor([len(w) for w in whole])
    return MicroBatch(
        rows=torch.tensor(rows),
        input_ids=torch.tensor([[*w, *[pad_id] * (length - len(w))] for w in whole]),
        position_ids=torch.arange(length).expand(len(rows), -1),
        layout=None,
        mask=(torch.arange(length) < sizes[:, None]).long(),
        predictor_M=torch.tensor(predictors),
        **_targets(tokens, rows, width),
    )


def _long(ids: list[int]) -> Tensor:
    """By way of numpy, which reads long lists five times faster than torch does."""
    return torch.from_numpy(np.array(ids, dtype=np.int64))


def _targets(tokens: Tokens, rows: Sequence[int], width: int) -> dict[str, Any]:
    completions = [tokens.completion_ids[row] for row in rows]
    return {
        "target_M": _long([y for c in completions for y in c]),
        "row_M": torch.from_numpy(np.repeat(np.arange(len(rows)), [len(c) for c in completions])),
        "step_M": _joined([range(len(c)) for c in completions]),
        "width": width,
    }
