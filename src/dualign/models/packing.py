"""From rows of token ids to micro-batches: one prompt, several completions, only the positions that are scored.

With prefix sharing a strip is [prompt, y_1, y_2, ...]: each completion attends to the prompt and to itself, with the
positions it would have alone, so the prompt is computed once for all its completions.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """Token ids of N rows; rows of one prompt have equal prompt_ids."""

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
class MicroBatch:
    """What one forward pass needs. R strips of L tokens; n rows; M scored tokens."""

    rows: Tensor  # (n,) long: which of the update's rows, in order
    input_ids: Tensor  # (R, L)
    position_ids: Tensor  # (R, L)
    mask: Tensor  # (R, 1, L, L) bool where prompts are shared; else (R, L) of 0/1
    predictor_M: Tensor  # flat position (in R*L) whose output predicts the token
    target_M: Tensor  # the token
    row_M: Tensor  # its row in the micro-batch, 0..n-1
    step_M: Tensor  # its place in the completion, 0..T-1
    width: int  # T of the result

    def to(self, device: torch.device) -> MicroBatch:
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor) and k != "rows"}
        return replace(self, **moved)

    def scatter(self, value_M: Tensor) -> Tensor:
        """(M,) per scored token -> (n, T), 0 elsewhere. Differentiable."""
        out = value_M.new_zeros(len(self.rows), self.width)
        return out.index_put((self.row_M, self.step_M), value_M)


Strip = list[int]  # rows that share one prompt


def plan(tokens: Tokens, rows: Sequence[int], budget: int, share: bool) -> list[list[Strip]]:
    """Micro-batches as lists of strips: whole prompts together, sorted by length, at most `budget` padded tokens each
    (a prompt that is longer on its own gets a micro-batch to itself)."""
    by_group: dict[int, list[int]] = defaultdict(list)
    for row in rows:
        by_group[tokens.group[row]].append(row)
    groups = [[members] if share else [[row] for row in members] for members in by_group.values()]
    measured = sorted(
        ((max(_length(tokens, strip) for strip in strips), strips) for strips in groups), key=lambda pair: -pair[0]
    )
    batches: list[list[Strip]] = []
    longest = 0
    for length, strips in measured:
        if batches and (len(batches[-1]) + len(strips)) * longest <= budget:
            batches[-1] += strips
        else:
            batches.append(list(strips))
            longest = length
    return batches


def _length(tokens: Tokens, strip: Strip) -> int:
    return len(tokens.prompt_ids[strip[0]]) + sum(len(tokens.completion_ids[row]) for row in strip)


def pack(tokens: Tokens, strips: Sequence[Strip], width: int, pad_id: int) -> MicroBatch:
    """The tensors of one micro-batch; `width` is the T of the log-probs it will give."""
    shared = any(len(strip) > 1 for strip in strips)
    length = max(_length(tokens, strip) for strip in strips)
    ids = torch.full((len(strips), length), pad_id)
    positions = torch.zeros(len(strips), length, dtype=torch.long)
    # segment 0: the prompt, seen by all; 1..k: the completions, each seen by itself; -1: padding
    segments = torch.full((len(strips), length), -1)
    rows, predictors, targets, row_ids, steps = [], [], [], [], []
    for r, strip in enumerate(strips):
        prompt = tokens.prompt_ids[strip[0]]
        end = len(prompt)
        ids[r, :end] = torch.tensor(prompt)
        positions[r, :end] = torch.arange(end)
        segments[r, :end] = 0
        at = end
        for segment, row in enumerate(strip, 1):
            completion = tokens.completion_ids[row]
            n = len(completion)
            ids[r, at : at + n] = torch.tensor(completion)
            positions[r, at : at + n] = torch.arange(end, end + n)
            segments[r, at : at + n] = segment
            # the first token is predicted at the prompt's end, each further one at its predecessor
            predictors += [r * length + end - 1, *range(r * length + at, r * length + at + n - 1)][:n]
            targets += completion
            row_ids += [len(rows)] * n
            steps += range(n)
            rows.append(row)
            at += n
    return MicroBatch(
        rows=torch.tensor(rows),
        input_ids=ids,
        position_ids=positions,
        mask=_sharing_mask(segments) if shared else (segments >= 0).long(),
        predictor_M=torch.tensor(predictors),
        target_M=torch.tensor(targets),
        row_M=torch.tensor(row_ids),
        step_M=torch.tensor(steps),
        width=width,
    )


def _sharing_mask(segments: Tensor) -> Tensor:
    """(R, L) segments -> (R, 1, L, L) bool: causal, and only the prompt or one's own completion (padding sees itself,
    so that no row of the softmax is empty)."""
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((key == 0) | (key == query)))[:, None]
