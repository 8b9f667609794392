"""How completions of a model are decoded: found out by trying, against the model itself.

Our decode loop keeps keys and values and says by masks which of them each layer sees. Whether that is all that a model
needs is not for us to know of every family: on loading, a few short texts are decoded, in fp32 and past every window,
and compared with plain forward passes. A model for which the loop is wrong decodes by its own cache and masks
(transformers' `generate`), which is slower. One that is wrong even so is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dualign.common.errors import FOREIGN, UserError, first_line, out_of_memory
from dualign.common.types import Prompt, Rollout
from dualign.models.packing import Tokens, pack
from dualign.models.policy import Policy, close
from dualign.models.windows import kinds_of, longest_step, windows_of
from dualign.rollout.base import Request, Sampler, Sampling

log = logging.getLogger(__name__)
LENGTHS = (11, 6)  # tokens of the trial's prompts: windows are shorter, and one prompt is padded
FEW = (6, 4)  # the same in the policy's own precision: a processor without bf16 units is slow in it
SHORT = (3, 2, 1)  # prompts that fill no state of a recurrent layer
NEVER = 1 << 30
NEW = 3  # tokens that are decoded by our loop: into the next small chunk; by the model's cache twice as many
LONG = 512  # tokens of a prompt, at most, that must be as long as a model's window or recurrent step
STEP = 64  # tokens that families with recurrent layers take at once where their configuration names no number
ROUNDING = 4.0  # times the rounding of a forward pass that decoding may be off by
LEAST = {"bf16": 0.02, "fp32": 0.001}  # nats a token that are never held against decoding


@dataclass(frozen=True)
class Decoding:
    """`own`: by our loop, else by the model's own masks and, for prompts of at least `shortest` tokens, its own cache.
    `agrees`: its log-probs were shown to be the model's in the policy's precision, to rounding. `rounding`: nats a token
    by which a forward pass in that precision is off."""

    own: bool
    shortest: int = 0
    agrees: bool = True
    rounding: float = 0.0

    def allowance(self, precision: str) -> float:
        """Nats a token that the sampler's log-probs may be off by, on average over the tokens of a batch."""
        return ROUNDING * self.rounding + LEAST[precision]


class NoTokenizer:
    """Stands in for a tokenizer while a model is tried: no text, no end."""

    eos_ids: frozenset[int] = frozenset()
    pad_id = 0

    def text(self, completion_ids: Sequence[int], chat: bool = False) -> str:
        return ""


def try_out(policy: Policy, sampler_by: Callable[[Decoding], Sampler]) -> Decoding:
    """The way in which `policy`'s model is decoded. `sampler_by` makes a sampler that decodes in a way. Raises UserError,
    with the reason, for a model that cannot be sampled from."""
    reached = _reached(policy)
    own = _tried(policy, sampler_by, Decoding(own=True), reached)
    if isinstance(own, Decoding) and own.agrees:
        return own
    other = _tried(policy, sampler_by, Decoding(own=False), reached)
    if isinstance(other, str):
        if isinstance(own, str):
            raise UserError(f"{policy.name} cannot be sampled from: {other} (in our decode loop: {own})")
        return own
    if isinstance(own, Decoding) and not other.agrees:
        return own
    without = "" if other.shortest == 0 else f"; without a cache for prompts of fewer than {other.shortest} tokens"
    without = "no cache at all" if other.shortest == NEVER else f"its own cache and masks{without}"
    why = own if isinstance(own, str) else "off by more than rounding"
    log.warning("%s decodes by %s: slower. Our decode loop: %s", policy.name, without, why)
    return other


def _reached(policy: Policy) -> bool:
    """Whether short texts reach beyond the model's windows, where it has any, once these are small."""
    if not windows_of(policy.model.config.get_text_config()):
        return True
    ids = prompt_of(policy, 0, sum(LENGTHS))
    with policy.on_trial(windows=False):
        as_it_is = policy.alone(ids[:1], ids[1:])
    with policy.on_trial():
        return not close(policy.alone(ids[:1], ids[1:]), as_it_is)


def _tried(policy: Policy, sampler_by: Callable[[Decoding], Sampler], way: Decoding, reached: bool) -> Decoding | str:
    """What was found out of one way, or the reason why it is wrong."""
    config = policy.model.config.get_text_config()
    if way.own and kinds_of(config) is None:
        return "some layers keep more than keys and values"
    longest = max(windows_of(config).values(), default=0) if not reached else 0
    if longest > LONG and way.own:
        return f"windows of {longest} tokens cannot be tried"  # only the model itself is trusted to know them
    steps = 0 if way.own else max(STEP, longest_step(config))
    lengths = [max(LENGTHS[0], min(max(steps, longest), LONG) + 3), LENGTHS[1], *(() if way.own else SHORT)]
    ways = [way] if way.own else [way, replace(way, shortest=lengths[1]), replace(way, shortest=NEVER)]
    why = ""
    for each in ways:
        try:
            gaps = _gaps(policy, sampler_by(each), lengths, NEW if way.own else 2 * NEW)
            wrong = [n for n, gap in gaps.items() if not gap <= policy.tolerance]
            if not wrong:
                return _in_precision(policy, sampler_by(each), each, proven=longest <= LONG)
            why = why or f"a token's log-prob is off by {gaps[wrong[0]]:.2g} nats"
        except FOREIGN as error:
            if out_of_memory(error):
                raise
            why = why or first_line(error)
    return why


def _gaps(policy: Policy, sampler: Sampler, lengths: Sequence[int], new: int) -> dict[int, float]:
    """The largest distance of a token's log-prob from the model's, in nats, by the length of its prompt."""
    with policy.on_trial():
        tokens, sampled_NT = _sampled(policy, sampler, lengths, 2, new)
        scored_NT = _scored(policy, tokens)
        # a score that is not finite stops a run by its own error
        gap_N = torch.where(scored_NT.isfinite(), (sampled_NT - scored_NT).abs(), 0.0).amax(1)
    gaps: dict[int, float] = {}
    for ids, gap in zip(tokens.prompt_ids, gap_N.tolist(), strict=True):
        gaps[len(ids)] = max(gap, gaps.get(len(ids), 0.0)) if gap == gap else float("nan")
    return gaps


def _in_precision(policy: Policy, sampler: Sampler, way: Decoding, proven: bool) -> Decoding:
    """Whether decoding in the policy's own precision is off by no more than rounding is."""
    if policy.precision == policy.exact:
        return replace(way, agrees=proven)
    with policy.on_trial(policy.precision):
        tokens, sampled_NT = _sampled(policy, sampler, FEW, 2, 3)
        rounded_NT = _scored(policy, tokens)
    with policy.on_trial():
        rounding = float((rounded_NT - _scored(policy, tokens)).abs().mean())
    gap = float((sampled_NT - rounded_NT).abs().mean())
    found = replace(way, rounding=rounding)
    return replace(found, agrees=proven and gap <= found.allowance(policy.precision))


def _sampled(policy: Policy, sampler: Sampler, lengths: Sequence[int], k: int, new: int) -> tuple[Tokens, Tensor]:
    """`k` completions of each prompt of these lengths, and (N, T) the log-probs that the sampler gives them."""
    requests = [Request(i, Prompt("trial", ""), prompt_of(policy, i, n)) for i, n in enumerate(lengths)]
    rollouts: list[Rollout] = []
    sampler.sample(requests, Sampling(k, new, 1.0), (0, 0), rollouts.append)
    rollouts.sort(key=lambda r: r.index)
    tokens = Tokens(
        tuple(r.prompt_ids for r in rollouts),
        tuple(r.completion_ids for r in rollouts),
        tuple(r.group for r in rollouts),
    )
    return tokens, torch.tensor([r.sampler_logp for r in rollouts], device=policy.device)


def _scored(policy: Policy, tokens: Tokens) -> Tensor:
    # plain rows: shared prompts are padded to many tokens, and were shown to say the same
    return policy(pack(tokens, range(len(tokens)), tokens.width, NoTokenizer.pad_id, False).to(policy.device)).float()


def prompt_of(policy: Policy, number: int, length: int) -> tuple[int, ...]:
    """Token ids of the trial's prompt `number`."""
    known = policy.sample_ids()
    return tuple(known[(7 * number + 3 * i + 1) % len(known)] for i in range(length))
