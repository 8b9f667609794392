"""A lean decode loop on transformers: each prompt is computed once for its K branches, finished rows are dropped, and
one pass over the logits gives the token and its log-prob."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from dualign.common import cpu
from dualign.common.errors import out_of_memory
from dualign.common.types import Prompt, Rollout
from dualign.models.attention import PACKED
from dualign.models.policy import Policy, Tokenizer
from dualign.models.windows import FULL, SLIDING, kinds_of, small_windows
from dualign.rollout.base import Request, Sampling, Weights, finished, uniforms
from dualign.rollout.hf.cache import BranchCache, Columns
from dualign.rollout.hf.cpu_linear import Product, laid_out_linears, product
from dualign.rollout.hf.draw import choose
from dualign.rollout.hf.generate import generate
from dualign.rollout.hf.graphs import Graphs
from dualign.rollout.hf.llama import LlamaStep, like_llama
from dualign.rollout.hf.trial import LENGTHS, Decoding, NoTokenizer, prompt_of, try_out

PREFILL = 8192  # tokens of prompts computed at a time
ROUNDING = 0.03  # how far a hand-written step may be from the model, relatively: bf16 puts it at some 0.01
COMPACT = 0.875  # drop finished rows from the cache once fewer than this share is alive
HALF = 0.5  # the same on a GPU, where another number of rows needs another graph
ROOM = 0.8  # of what is free on a GPU that keys and values may take: a step needs some, too
LOOK = 8  # steps between two looks at a GPU's tokens, which wait for it


class HFSampler:
    """Samples from a Policy's model: with a key-value cache and masks of ours where these were found to be right, else
    with the model's own. On a CUDA device a step of ours is a graph, replayed."""

    def __init__(
        self,
        policy: Policy,
        tokenizer: Tokenizer | NoTokenizer,
        rows: int,
        cuda_graphs: bool = True,
        decoding: Decoding | None = None,
    ) -> None:
        self.policy, self.tokenizer, self.rows = policy, tokenizer, rows
        self.decoding = decoding or decoding_of(policy)
        self.head: Product | None = None
        self.hand_written: LlamaStep | None = None
        self.agrees: bool | None = None  # whether the hand-written step says what the model says, once tried
        named = inspect.signature(policy.base.forward).parameters  # transformers 5.23 renamed it
        self.cache_name = "cache" if "cache" in named else "past_key_values"
        self.cuda = policy.device.type == "cuda"
        self.kinds = self._kinds()
        attention = policy.model.config._attn_implementation
        self.masked = attention in ("sdpa", PACKED, "eager")  # others build their masks from the 2-D form
        self.sdpa = attention in ("sdpa", PACKED)  # others may look at lengths that a graph would freeze
        self.graphs = Graphs(self.cuda and cuda_graphs and self.sdpa)

    @torch.inference_mode()
    def sample(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: tuple[int, int],
        done: Callable[[Rollout], None],
        held: Container[int] = (),
    ) -> None:
        """Calls `done` once per completion, as it finishes. Prompts of similar length are decoded together; rows are
        decoded in the company that they always have, to the last bit: what is left out is a whole such batch."""
        was_training = self.policy.training
        self.policy.eval()
        with self.policy.whole():  # before the first question: other processes have some
            if self.decoding.own and requests:
                self._sample(requests, sampling, seed, done)
            elif requests:
                shortest = self.decoding.shortest
                generate(self.policy, self.tokenizer, self.rows, requests, sampling, seed, done, shortest)
        self.policy.train(was_training)

    def _sample(
        self, requests: Sequence[Request], sampling: Sampling, seed: tuple[int, int], done: Callable[[Rollout], None]
    ) -> None:
        by_length = sorted(requests, key=lambda r: -len(r.prompt_ids))
        most = min(self.rows, self._room(len(by_length[0].prompt_ids) + sampling.max_new_tokens))
        step = max(1, most // sampling.k)
        rows = min(most, len(requests) * sampling.k)
        if self.policy.plain_head:
            self.head = product(self.policy.rounded_head(), None, rows)
        with self._prepared(rows):
            for at in range(0, len(by_length), step):
                self._decode(by_length[at : at + step], sampling, seed, done)
        self.head = None

    def _room(self, length: int) -> int:
        """How many rows of `length` tokens a GPU has room for the keys and values of. A power of two: what is free
        differs a little after a resume, which is to decode the same rows together."""
        if not self.cuda:
            return self.rows
        each = length * bytes_per_token(self.policy.model.config.get_text_config(), self.policy.dtype)
        return 2 ** max(0, int(ROOM * cpu.free_on_gpu(self.policy.device) / each).bit_length() - 1)

    def sync(self, weights: Weights) -> None:
        """Nothing to do: it samples from the policy's own weights."""

    @contextmanager
    def _prepared(self, rows: int) -> Iterator[None]:
        """On a CPU bf16 weights are laid out once for all steps: those of a hand-written step, where the model
        allows it, or else of each linear layer."""
        self.hand_written = self._hand_written_step(rows)
        try:
            with nullcontext() if self.hand_written else laid_out_linears(self.policy.base, rows):
                yield
        finally:
            self.hand_written = None

    def _hand_written_step(self, rows: int) -> LlamaStep | None:
        """The step with weights as they are now; None where the model, when it was tried, said something else."""
        if self.agrees is False or self.head is None or not self.sdpa or len(self.kinds) > 1:
            return None
        if not like_llama(self.policy.base):
            return None
        try:
            step = LlamaStep(self.policy.base, self.head, rows)
            if self.agrees is None:
                self.agrees = self._tried(step)
        except (RuntimeError, AttributeError, TypeError, ValueError) as error:  # other shapes, norms of another kind
            if out_of_memory(error):  # says nothing of the model, and a resumed run must decide alike
                raise
            self.agrees = False
        return step if self.agrees else None

    def _tried(self, step: LlamaStep) -> bool:
        """Whether the step says what the model says, to bf16's rounding: a model with Llama's parts may put them together
        in another way. Every layer's key and value are compared, too: one layer among many that rotates in another way
        would hardly show in the logits of a short prompt. Past windows, which are small for once."""
        requests = [Request(i, Prompt("trial", ""), prompt_of(self.policy, i, n)) for i, n in enumerate((24, 9, 9, 3))]
        with small_windows(self.policy.model):
            d = self._prefill(requests, Sampling(1, 2, 1.0), torch.full((len(requests), 2), 0.5, dtype=torch.float64))
            d.columns.grow()
            newest = self._newest(d)

            def said(step: LlamaStep | None) -> list[Tensor]:
                logits_NV = self._logits(*newest, d.cache, step).float()
                return [logits_NV - logits_NV.mean(-1, keepdim=True), *(x.float() for x in d.cache.newest())]

            pairs = zip(said(None), said(step), strict=True)
            return all(bool((found - expected).norm() <= ROUNDING * expected.norm()) for expected, found in pairs)

    def _decode(
        self, requests: Sequence[Request], s: Sampling, seed: tuple[int, int], done: Callable[[Rollout], None]
    ) -> None:
        rows = [(r, r.group * s.k + k) for r in requests for k in range(s.k)]
        look, compact = (LOOK, HALF) if self.cuda else (1, COMPACT)
        eos = torch.tensor(sorted(self.tokenizer.eos_ids), dtype=torch.long, device=self.policy.device)
        d = self._prefill(
            requests, s, torch.from_numpy(np.stack([uniforms(seed, i, s.max_new_tokens) for _, i in rows]))
        )
        open_N = torch.ones(len(rows), dtype=torch.bool)  # rows that have not finished
        with self.graphs:
            for count in range(1, s.max_new_tokens + 1):
                last = count == s.max_new_tokens
                if last or count % look == 0:
                    end_N = first_true(torch.isin(d.token_NT[:, :count], eos)).cpu()  # `count` where there is none
                    closed = open_N & (last | (end_N < count))
                    if closed.any():
                        token_NT, logp_NT = d.token_NT.cpu(), d.logp_NT.cpu()
                    for i in closed.nonzero()[:, 0].tolist():
                        upto = min(int(end_N[i]) + 1, count)
                        ids, logp = token_NT[i, :upto].tolist(), logp_NT[i, :upto].tolist()
                        done(finished(rows[i], self.tokenizer, ids, logp))
                    open_N &= ~closed
                    if not open_N.any():
                        return
                    if int(open_N.sum()) < compact * len(rows):
                        keep = open_N.nonzero()[:, 0]
                        d.select(keep.to(self.policy.device))
                        rows, open_N = [rows[i] for i in keep.tolist()], open_N[keep]
                d.columns.grow()
                self.graphs.run((len(rows), d.columns.seen), lambda: self._step(d, s))

    def _step(self, d: InFlight, s: Sampling) -> None:
        """The next token of every row. All that changes is changed in place, by tensors that say where, so that it can
        be a graph."""
        logits_NV = self._logits(*self._newest(d), d.cache, self.hand_written)
        self._choose(logits_NV, d, s, d.step.add_(1))
        d.position_N += 1
        d.columns.at += 1

    def _newest(self, d: InFlight) -> tuple[Tensor, Tensor, Tensor | dict[str, Tensor]]:
        """Every row's newest token and its position, (N, 1), and what it sees."""
        token_N1 = d.token_NT.index_select(1, d.step)
        d.visible_NL.index_fill_(1, d.columns.at, True)
        return token_N1, d.position_N[:, None], self._masks(d)

    def _choose(self, logits_NV: Tensor, d: InFlight, s: Sampling, step: Tensor) -> None:
        token_N, logp_N = choose(logits_NV, s, d.draw_NT.index_select(1, step)[:, 0])
        d.token_NT.index_copy_(1, step, token_N[:, None])
        d.logp_NT.index_copy_(1, step, logp_N[:, None])

    def _masks(self, d: InFlight) -> Tensor | dict[str, Tensor]:
        """What the newest token of each row sees, by the kind of layer where there are several; made once for all layers,
        and as numbers to add: of a mask that says what is seen every layer would make them anew."""
        visible_NL = d.visible_NL[:, : d.columns.seen]
        if not self.masked:
            return visible_NL.long()
        masks = {kind: self._added(self._seen(visible_NL, d, kind, size)) for kind, size in self.kinds.items()}
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _seen(self, visible_NL: Tensor, d: InFlight, kind: str, size: int) -> Tensor:
        """(N, L): the columns that layers of one kind see: all, those of the last `size` tokens, or those of the newest
        token's chunk of `size` tokens."""
        if kind == FULL:
            return visible_NL
        before_L = d.columns.at - torch.arange(d.columns.seen, device=self.policy.device)
        upto_N1 = torch.full_like(d.position_N, size - 1) if kind == SLIDING else d.position_N % size
        return visible_NL & (before_L <= upto_N1[:, None])

    def _added(self, seen_NL: Tensor) -> Tensor:
        added_NL = torch.zeros(seen_NL.shape, dtype=self.policy.dtype, device=self.policy.device)
        return added_NL.masked_fill_(~seen_NL, float("-inf"))[:, None, None]

    def _kinds(self) -> dict[str, int]:
        return kinds_of(self.policy.model.config.get_text_config()) or {FULL: 0}

    def _prefill(self, requests: Sequence[Request], s: Sampling, draw_NT: Tensor) -> InFlight:
        """Computes each prompt once, branches it K times and draws the first tokens."""
        device, n = self.policy.device, len(requests) * s.k
        self.kinds = self._kinds()
        length = max(len(r.prompt_ids) for r in requests)
        columns = Columns(length, length + s.max_new_tokens, device)
        cache = BranchCache(n, columns, self.policy.dtype)
        visible_NL = torch.zeros(n, columns.capacity, dtype=torch.bool, device=device)
        parts: list[tuple[Tensor, Tensor]] = []
        for at, part in _slices(requests):
            ids, visible = self._left_padded(part)
            position = (visible.long().cumsum(1) - 1).clamp(min=0)
            prompts = DynamicCache()
            logits = self._logits(ids, position, visible.long(), prompts)
            cache.branch(prompts, at, s.k)
            rows = visible_NL[at * s.k : (at + len(part)) * s.k]
            rows[:, length - visible.shape[1] : length] = visible.repeat_interleave(s.k, 0)
            parts.append((logits, position[:, -1] + 1))
        logits_NV, position_N = (torch.cat(x).repeat_interleave(s.k, 0) for x in zip(*parts, strict=True))
        token_NT = torch.zeros(n, s.max_new_tokens, dtype=torch.long, device=device)
        step = torch.zeros(1, dtype=torch.long, device=device)
        d = InFlight(cache, columns, visible_NL, position_N, draw_NT.to(device), token_NT, token_NT.float(), step)
        self._choose(logits_NV, d, s, step)
        return d

    def _left_padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Ids and which of them are the prompt's, so that all prompts end together."""
        length = max(len(r.prompt_ids) for r in requests)
        ids = torch.full((len(requests), length), self.tokenizer.pad_id)
        visible = torch.zeros(len(requests), length, dtype=torch.bool)
        for i, r in enumerate(requests):
            ids[i, length - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
            visible[i, length - len(r.prompt_ids) :] = True
        return ids.to(self.policy.device), visible.to(self.policy.device)

    def _logits(self, ids: Tensor, position: Tensor, mask: Any, cache: Cache, step: LlamaStep | None = None) -> Tensor:
        """The next token's logits, (N, V), by the model or by `step`."""
        if step is not None:
            return step(ids[:, 0], position[:, 0], mask, cache)
        inputs = {"input_ids": ids, "position_ids": position, "attention_mask": mask, self.cache_name: cache}
        with self.policy.autocast():
            if self.head is None:
                return self.policy.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
            hidden = self.policy.base(**inputs, use_cache=True).last_hidden_state[:, -1]
            return self.head(hidden)


def decoding_of(policy: Policy) -> Decoding:
    """How completions of the policy's model are decoded, found out once: best before its weights are rounded. Raises
    UserError for a model that cannot be sampled from."""
    if policy.decoding is None:
        policy.decoding = try_out(policy, lambda way: HFSampler(policy, NoTokenizer(), len(LENGTHS) * 2, False, way))
    return policy.decoding


def bytes_per_token(text: Any, dtype: torch.dtype) -> int:
    """Of a token's keys and values, in all layers of the model of configuration `text`."""
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    heads = max(heads) if isinstance(heads, (list, tuple)) else heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)


def _slices(requests: Sequence[Request]) -> Iterator[tuple[int, Sequence[Request]]]:
    """Requests, the longest first, in slices of at most PREFILL tokens with padding, and the place of each slice's first."""
    at = 0
    while at < len(requests):
        count = max(1, PREFILL // len(requests[at].prompt_ids))
        yield at, requests[at : at + count]
        at += count


@dataclass
class InFlight:
    """What is known of N rows that are being decoded."""

    cache: BranchCache
    columns: Columns
    visible_NL: Tensor  # which of the cache's columns a row sees
    position_N: Tensor  # the next token's
    draw_NT: Tensor  # the uniforms that choose tokens
    token_NT: Tensor
    logp_NT: Tensor
    step: Tensor  # (1,) the place of the newest token

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        for name in ("visible_NL", "position_N", "draw_NT", "token_NT", "logp_NT"):
            setattr(self, name, getattr(self, name)[rows])


def first_true(which_NT: Tensor) -> Tensor:
    """(N,) the first place that holds True; T where none does."""
    return torch.where(which_NT.any(1), which_NT.int().argmax(1), which_NT.shape[1])
