"""A lean decode loop on transformers: each prompt is computed once for its K branches, finished rows are dropped, and
one pass over the logits gives the token and its log-prob."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from dualign.models.attention import PACKED
from dualign.models.policy import Policy, Tokenizer
from dualign.rollout.base import Request, Sampling, uniforms
from dualign.rollout.packed import Product, laid_out_linears, product
from dualign.types import Rollout

BLOCK = 256  # two-level inverse CDF: a sum per block of the vocabulary, then a scan inside one block
ROWS = 8  # rows whose logits are turned into tokens at a time on a CPU
PREFILL = 8192  # tokens of prompts computed at a time
COMPACT = 0.875  # drop finished rows from the cache once fewer than this share is alive


class HFSampler:
    """Samples from a Policy's model with its own key-value cache."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer, rows: int) -> None:
        self.policy, self.tokenizer, self.rows = policy, tokenizer, rows
        self.head: Product | None = None
        named = inspect.signature(policy.base.forward).parameters  # transformers 5.23 renamed it
        self.cache_name = "cache" if "cache" in named else "past_key_values"

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
        by_length = sorted(requests, key=lambda r: -len(r.prompt_ids))
        step = max(1, self.rows // sampling.k)
        was_training = self.policy.training
        self.policy.eval()
        rows = min(self.rows, len(requests) * sampling.k)
        if self.policy.plain_head:
            self.head = product(self.policy.rounded_head(), None, rows)
        with laid_out_linears(self.policy.base, rows):
            for at in range(0, len(by_length), step):
                self._decode(by_length[at : at + step], sampling, seed, done)
        self.head = None
        self.policy.train(was_training)

    def sync(self) -> None:
        """Nothing to do: it samples from the policy's own weights."""

    def _decode(
        self, requests: Sequence[Request], s: Sampling, seed: tuple[int, int], done: Callable[[Rollout], None]
    ) -> None:
        device = self.policy.device
        eos = torch.tensor(sorted(self.tokenizer.eos_ids), device=device)
        cache, logits_NV, visible_NL, position_N = self._prefill(requests, s)
        rows = [(r, r.group * s.k + k) for r in requests for k in range(s.k)]
        draw_NT = torch.from_numpy(np.stack([uniforms(seed, i, s.max_new_tokens) for _, i in rows])).to(device)
        n = len(rows)
        token_NT = torch.zeros(n, s.max_new_tokens, dtype=torch.long, device=device)
        logp_NT = torch.zeros(n, s.max_new_tokens, device=device)
        alive = torch.arange(n, device=device)  # rows of the tensors above that the cache still holds
        open_N = torch.ones(n, dtype=torch.bool, device=device)  # of those, the ones not yet finished
        for t in range(s.max_new_tokens):
            token_N, step_logp_N = choose(logits_NV, s, draw_NT[alive, t])
            token_NT[alive, t], logp_NT[alive, t] = token_N, step_logp_N
            ended_N = open_N & torch.isin(token_N, eos)
            last = t + 1 == s.max_new_tokens
            for i in (alive[open_N] if last else alive[ended_N]).tolist():
                ids = token_NT[i, : t + 1].tolist()
                self._finish(rows[i], ids, logp_NT[i, : t + 1].tolist(), done)
            open_N = open_N & ~ended_N
            count = int(open_N.sum())
            if last or count == 0:
                return
            if count < COMPACT * len(alive):
                keep = open_N.nonzero()[:, 0]
                cache.select(keep)
                alive, visible_NL, position_N, token_N = alive[keep], visible_NL[keep], position_N[keep], token_N[keep]
                open_N = open_N[keep]
            visible_NL = torch.cat([visible_NL, visible_NL.new_ones(len(alive), 1)], 1)
            logits_NV = self._logits(token_N[:, None], (position_N + t)[:, None], self._mask(visible_NL), cache)

    def _mask(self, visible_NL: Tensor) -> Tensor:
        """One query per row. SDPA takes the mask as it is; other kinds build theirs from the 2-D form."""
        sdpa = self.policy.model.config._attn_implementation in ("sdpa", PACKED)
        return visible_NL[:, None, None] if sdpa else visible_NL.long()

    def _prefill(self, requests: Sequence[Request], s: Sampling) -> tuple[BranchCache, Tensor, Tensor, Tensor]:
        """Computes each prompt once and branches it K times. Returns the cache, the first token's logits (N, V), the
        visible positions (N, L) and each row's next position (N,)."""
        length = max(len(r.prompt_ids) for r in requests)
        cache = BranchCache(len(requests) * s.k, length, s.max_new_tokens, self.policy.dtype)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for at, part in _slices(requests):
            ids, visible = self._left_padded(part)
            position = (visible.long().cumsum(1) - 1).clamp(min=0)
            prompts = DynamicCache()
            logits = self._logits(ids, position, visible.long(), prompts)
            cache.branch(prompts, at, s.k)
            visible = torch.nn.functional.pad(visible, (length - visible.shape[1], 0))
            parts.append((logits, visible, position[:, -1] + 1))
        logits_NV, visible_NL, position_N = (torch.cat(x).repeat_interleave(s.k, 0) for x in zip(*parts, strict=True))
        return cache, logits_NV, visible_NL, position_N

    def _left_padded(self, requests: Sequence[Request]) -> tuple[Tensor, Tensor]:
        """Ids and which of them are the prompt's, so that all prompts end together."""
        length = max(len(r.prompt_ids) for r in requests)
        ids = torch.full((len(requests), length), self.tokenizer.pad_id)
        visible = torch.zeros(len(requests), length, dtype=torch.bool)
        for i, r in enumerate(requests):
            ids[i, length - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
            visible[i, length - len(r.prompt_ids) :] = True
        return ids.to(self.policy.device), visible.to(self.policy.device)

    def _logits(self, ids: Tensor, position: Tensor, mask: Tensor, cache: Cache) -> Tensor:
        """The next token's logits, (N, V)."""
        inputs = {"input_ids": ids, "position_ids": position, "attention_mask": mask, self.cache_name: cache}
        with self.policy.autocast():
            if self.head is None:
                return self.policy.model(**inputs, use_cache=True, logits_to_keep=1).logits[:, -1]
            hidden = self.policy.base(**inputs, use_cache=True).last_hidden_state[:, -1]
            return self.head(hidden)

    def _finish(
        self, row: tuple[Request, int], ids: list[int], logp: list[float], done: Callable[[Rollout], None]
    ) -> None:
        request, index = row
        ended = ids[-1] in self.tokenizer.eos_ids
        done(
            Rollout(
                index=index,
                group=request.group,
                prompt=request.prompt,
                prompt_ids=request.prompt_ids,
                completion_ids=tuple(ids),
                text=self.tokenizer.text(ids[:-1] if ended else ids),
                finish="eos" if ended else "length",
                sampler_logp=tuple(logp),
            )
        )


def choose(logits_NV: Tensor, s: Sampling, draw_N: Tensor) -> tuple[Tensor, Tensor]:
    """The next token (N,) at temperature and top-p by inverse CDF from one uniform each, and its log-prob under the
    untempered model (N,). On a CPU a few rows at a time, so that a row's passes stay in cache."""
    if logits_NV.device.type == "cpu" and len(logits_NV) > ROWS:
        parts = [choose(part, s, draw) for part, draw in zip(logits_NV.split(ROWS), draw_N.split(ROWS), strict=True)]
        tokens, logps = zip(*parts, strict=True)
        return torch.cat(tokens), torch.cat(logps)
    logits_NV = logits_NV.float()
    if s.temperature == 0:
        token_N = logits_NV.argmax(-1)
    else:
        weight_NV = torch.softmax(logits_NV / s.temperature, -1)
        if s.top_p < 1:
            weight_NV = nucleus(weight_NV, s.top_p)
        token_N = inverse_cdf(weight_NV, draw_N)
    norm_N = torch.logsumexp(logits_NV, -1)
    return token_N, logits_NV.gather(1, token_N[:, None])[:, 0] - norm_N


def nucleus(weight_NV: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens that holds `top_p` of the mass."""
    ordered, order = weight_NV.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(weight_NV).scatter(1, order, ordered.masked_fill(before >= top_p, 0))


def inverse_cdf(weight_NV: Tensor, draw_N: Tensor) -> Tensor:
    """The token whose share of the (unnormalised) mass contains the uniform. Two levels, so that no scan runs over the
    whole vocabulary."""
    n, v = weight_NV.shape
    if v % BLOCK:
        weight_NV = torch.nn.functional.pad(weight_NV, (0, -v % BLOCK))
    padded = weight_NV.view(n, -1, BLOCK)
    upto_NB = padded.sum(-1).double().cumsum(-1)
    point_N = draw_N.to(torch.float64) * upto_NB[:, -1]
    block_N = torch.searchsorted(upto_NB, point_N[:, None], right=True).clamp(max=upto_NB.shape[1] - 1)
    before_N = torch.where(block_N > 0, upto_NB.gather(1, (block_N - 1).clamp(min=0)), 0.0)
    inside = padded.gather(1, block_N[:, :, None].expand(n, 1, BLOCK))[:, 0].double()
    rank_N = torch.searchsorted(inside.cumsum(-1), point_N[:, None] - before_N, right=True)
    # rounding may point past the block's last token with mass: take that one
    last_N = (inside > 0).int().mul(torch.arange(1, BLOCK + 1, device=inside.device)).argmax(-1, keepdim=True)
    return (block_N * BLOCK + torch.minimum(rank_N, last_N))[:, 0]


def _slices(requests: Sequence[Request]) -> Iterator[tuple[int, Sequence[Request]]]:
    """Requests, the longest first, in slices of at most PREFILL tokens with padding, and the place of each slice's first."""
    at = 0
    while at < len(requests):
        count = max(1, PREFILL // len(requests[at].prompt_ids))
        yield at, requests[at : at + count]
        at += count


class BranchCache(Cache):
    """A key-value cache with room for `rows` completions, the prompts' `length` and `room` new tokens from the start: a
    step writes one column instead of copying the cache."""

    def __init__(self, rows: int, length: int, room: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.new_layer = lambda: _BranchLayer(rows, length, room, dtype)

    def branch(self, prompts: Cache, at: int, k: int) -> None:
        """Takes over computed prompts, the first of them as prompt number `at`: one row per prompt -> K rows."""
        for i, layer in enumerate(prompts.layers):
            if i == len(self.layers):
                self.layers.append(self.new_layer())
            self.layers[i].branch(layer.keys, layer.values, at * k, k)

    def select(self, rows: Tensor) -> None:
        for layer in self.layers:
            layer.select(rows)


class _BranchLayer(CacheLayerMixin):
    """keys, values: (N, heads, capacity, head size), of which the first `length` positions are filled."""

    def __init__(self, rows: int, length: int, room: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.length, self.capacity, self.dtype = rows, length, length + room, dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # attention under autocast rounds keys and values at every step: `dtype` keeps them rounded
        self.keys, self.values = (
            x.new_empty(self.rows, x.shape[1], self.capacity, x.shape[3], dtype=self.dtype)
            for x in (key_states, value_states)
        )
        self.is_initialized = True

    def branch(self, keys: Tensor, values: Tensor, row: int, k: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for own, x in ((self.keys, keys), (self.values, values)):
            assert own is not None
            rows, start = own[row : row + len(x) * k], self.length - x.shape[2]
            rows[:, :, :start] = 0  # masked, but a weight of zero times what memory happens to hold may be NaN
            rows[:, :, start : self.length].unflatten(0, (len(x), k)).copy_(x[:, None])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keeps `rows`, moved up within the memory that there is."""
        assert self.keys is not None and self.values is not None
        for x in (self.keys, self.values):
            x[: len(rows), :, : self.length] = x[:, :, : self.length].index_select(0, rows)
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1
