"""A lean decode loop on transformers: each prompt is computed once for its K branches, finished rows are dropped, and
one pass over the logits gives the token and its log-prob."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from dualign.models.attention import PACKED
from dualign.models.fused import Fused
from dualign.models.logprobs import target_logp
from dualign.models.policy import Policy, Tokenizer
from dualign.rollout.base import Request, Sampling, uniforms
from dualign.rollout.graphs import Graphs
from dualign.rollout.packed import Product, laid_out_linears, product
from dualign.types import Rollout

BLOCK = 256  # two-level inverse CDF: a sum per block of the vocabulary, then a scan inside one block
ROWS = 8  # rows whose logits are turned into tokens at a time on a CPU
PREFILL = 8192  # tokens of prompts computed at a time
COMPACT = 0.875  # drop finished rows from the cache once fewer than this share is alive
HALF = 0.5  # the same on a GPU, where another number of rows needs another graph
LOOK = 8  # steps between two looks at a GPU's tokens, which wait for it
WINDOW = 64  # columns by which a GPU's attention grows


class HFSampler:
    """Samples from a Policy's model with its own key-value cache. On a CUDA device a step is a graph, replayed."""

    def __init__(self, policy: Policy, tokenizer: Tokenizer, rows: int, cuda_graphs: bool = True) -> None:
        self.policy, self.tokenizer, self.rows = policy, tokenizer, rows
        self.head: Product | None = None
        named = inspect.signature(policy.base.forward).parameters  # transformers 5.23 renamed it
        self.cache_name = "cache" if "cache" in named else "past_key_values"
        self.cuda = policy.device.type == "cuda"
        # other kinds of attention may look at their mask, or at lengths that a graph would freeze
        self.sdpa = policy.model.config._attn_implementation in ("sdpa", PACKED)
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
        rows = [(r, r.group * s.k + k) for r in requests for k in range(s.k)]
        look, compact = (LOOK, HALF) if self.cuda else (1, COMPACT)
        eos = torch.tensor(sorted(self.tokenizer.eos_ids), device=self.policy.device)
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
                        self._finish(rows[i], token_NT[i, :upto].tolist(), logp_NT[i, :upto].tolist(), done)
                    open_N &= ~closed
                    if not open_N.any():
                        return
                    if int(open_N.sum()) < compact * len(rows):
                        keep = open_N.nonzero()[:, 0]
                        d.select(keep.to(self.policy.device))
                        rows, open_N = [rows[i] for i in keep.tolist()], open_N[keep]
                d.columns.grow()
                self.graphs.run((len(rows), d.columns.seen), lambda: self._step(d, s))

    def _step(self, d: Decoding, s: Sampling) -> None:
        """The next token of every row. All that changes is changed in place, by tensors that say where, so that it can
        be a graph."""
        token_N1 = d.token_NT.index_select(1, d.step)
        d.visible_NL.index_fill_(1, d.columns.at, True)
        mask = self._mask(d.visible_NL[:, : d.columns.seen])
        self._choose(self._logits(token_N1, d.position_N[:, None], mask, d.cache), d, s, d.step.add_(1))
        d.position_N += 1
        d.columns.at += 1

    def _choose(self, logits_NV: Tensor, d: Decoding, s: Sampling, step: Tensor) -> None:
        token_N, logp_N = choose(logits_NV, s, d.draw_NT.index_select(1, step)[:, 0])
        d.token_NT.index_copy_(1, step, token_N[:, None])
        d.logp_NT.index_copy_(1, step, logp_N[:, None])

    def _mask(self, visible_NL: Tensor) -> Tensor:
        """One query per row. SDPA takes the mask as it is; other kinds build theirs from the 2-D form."""
        return visible_NL[:, None, None] if self.sdpa else visible_NL.long()

    def _prefill(self, requests: Sequence[Request], s: Sampling, draw_NT: Tensor) -> Decoding:
        """Computes each prompt once, branches it K times and draws the first tokens."""
        device, n = self.policy.device, len(requests) * s.k
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
        d = Decoding(cache, columns, visible_NL, position_N, draw_NT.to(device), token_NT, token_NT.float(), step)
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
    untempered model (N,)."""
    if s.temperature == 0:
        token_N = logits_NV.argmax(-1)
    elif s.top_p < 1:
        parts = [
            inverse_cdf(nucleus(torch.softmax(logits.float() / s.temperature, -1), s.top_p), draw)
            for logits, draw in zip(_few(logits_NV), _few(draw_N), strict=True)
        ]
        token_N = torch.cat(parts)
    else:
        token_N = draw_from(logits_NV, s.temperature, draw_N)
    return token_N, torch.cat([target_logp(*part) for part in zip(_few(logits_NV), _few(token_N), strict=True)])


def _few(x: Tensor) -> Sequence[Tensor]:
    """On a CPU a few rows at a time, so that a row's passes over the vocabulary stay in cache."""
    return x.split(ROWS) if x.device.type == "cpu" else (x,)


def nucleus(weight_NV: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens that holds `top_p` of the mass."""
    ordered, order = weight_NV.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(weight_NV).scatter(1, order, ordered.masked_fill(before >= top_p, 0))


def draw_from(logits_NV: Tensor, temperature: float, draw_N: Tensor) -> Tensor:
    """The token at which the cumulative softmax(logits / temperature) passes the uniform; the softmax is never held as
    a whole."""
    top_N1, mass_NB = map(torch.cat, zip(*(_masses(part, temperature) for part in _few(logits_NV)), strict=True))
    return _two_levels(
        mass_NB, lambda block_N: ((_block(logits_NV, block_N, -torch.inf).float() - top_N1) / temperature).exp(), draw_N
    )


def inverse_cdf(weight_NV: Tensor, draw_N: Tensor) -> Tensor:
    """The same for (unnormalised) weights."""
    return _two_levels(_sums(weight_NV), lambda block_N: _block(weight_NV, block_N, 0), draw_N)


def _two_levels(mass_NB: Tensor, inside: Callable[[Tensor], Tensor], draw_N: Tensor) -> Tensor:
    """The token whose share of the mass contains the uniform: first its block by the blocks' masses, then its place by
    the masses inside, so that no scan runs over the whole vocabulary."""
    upto_NB = mass_NB.double().cumsum(-1)
    point_N1 = (draw_N.to(torch.float64) * upto_NB[:, -1])[:, None]
    block_N1 = torch.searchsorted(upto_NB, point_N1, right=True).clamp(max=upto_NB.shape[1] - 1)
    before_N1 = torch.where(block_N1 > 0, upto_NB.gather(1, (block_N1 - 1).clamp(min=0)), 0.0)
    inside_NC = inside(block_N1).double()
    rank_N1 = torch.searchsorted(inside_NC.cumsum(-1), point_N1 - before_N1, right=True)
    # rounding may point past the block's last token with mass: take that one
    last_N1 = (inside_NC > 0).int().mul(torch.arange(1, BLOCK + 1, device=mass_NB.device)).argmax(-1, keepdim=True)
    return (block_N1 * BLOCK + torch.minimum(rank_N1, last_N1))[:, 0]


@Fused
def _masses(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The largest logit (N, 1) and, relative to its own, the mass of each block of the vocabulary (N, B)."""
    wide_NV = logits_NV.float()
    top_N1 = wide_NV.amax(-1, keepdim=True)
    return top_N1, _sums((wide_NV - top_N1).div_(temperature).exp_())


def _sums(weight_NV: Tensor) -> Tensor:
    """(N, B): of each BLOCK tokens."""
    return torch.nn.functional.pad(weight_NV, (0, -weight_NV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(-1)


def _block(value_NV: Tensor, block_N1: Tensor, beyond: float) -> Tensor:
    """(N, BLOCK): each row's values in its block."""
    at_NC = block_N1 * BLOCK + torch.arange(BLOCK, device=value_NV.device)
    last = value_NV.shape[1] - 1
    return value_NV.gather(1, at_NC.clamp(max=last)).masked_fill(at_NC > last, beyond)


def _slices(requests: Sequence[Request]) -> Iterator[tuple[int, Sequence[Request]]]:
    """Requests, the longest first, in slices of at most PREFILL tokens with padding, and the place of each slice's first."""
    at = 0
    while at < len(requests):
        count = max(1, PREFILL // len(requests[at].prompt_ids))
        yield at, requests[at : at + count]
        at += count


class Columns:
    """Which of a cache's columns are filled. All layers share it; they do not hold the cache, which would keep each
    other's memory until garbage is collected."""

    def __init__(self, length: int, capacity: int, device: torch.device) -> None:
        self.length, self.step = length, WINDOW if device.type == "cuda" else 1
        self.capacity = self._whole_steps(capacity)
        self.at = torch.full((1,), length, device=device)  # the column to write next, as a tensor
        self.seen = length  # columns that attention reads: from a graph's sight a number that rarely changes

    def _whole_steps(self, length: int) -> int:
        return length + -length % self.step

    def grow(self) -> None:
        """Makes room for the tokens of one more step."""
        self.length += 1
        self.seen = self._whole_steps(self.length)


class BranchCache(Cache):
    """A key-value cache with room for `rows` completions, the prompts and all new tokens from the start: a step writes
    one column instead of copying the cache."""

    def __init__(self, rows: int, columns: Columns, dtype: torch.dtype) -> None:
        super().__init__(layers=[])
        self.new_layer = lambda: _BranchLayer(rows, columns, dtype)

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
    """keys, values: (N, heads, capacity, head size), of which the first `columns.length` positions are filled."""

    def __init__(self, rows: int, columns: Columns, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns, self.dtype = rows, columns, dtype

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # attention under autocast rounds keys and values at every step: `dtype` keeps them rounded
        self.keys, self.values = (
            x.new_zeros(self.rows, x.shape[1], self.columns.capacity, x.shape[3], dtype=self.dtype)
            for x in (key_states, value_states)  # zeros: a masked weight of zero times what memory may hold can be NaN
        )
        self.is_initialized = True

    def branch(self, keys: Tensor, values: Tensor, row: int, k: int) -> None:
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        for own, x in ((self.keys, keys), (self.values, values)):
            assert own is not None
            rows, end = own[row : row + len(x) * k], self.columns.length
            rows[:, :, end - x.shape[2] : end].unflatten(0, (len(x), k)).copy_(x[:, None])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None and self.values is not None
        for own, new in ((self.keys, key_states), (self.values, value_states)):
            if own.device.type == "cpu":
                own[:, :, self.columns.length - 1 : self.columns.length] = new
            else:
                own.index_copy_(2, self.columns.at, new.to(own.dtype))
        return self.keys[:, :, : self.columns.seen], self.values[:, :, : self.columns.seen]

    def select(self, rows: Tensor) -> None:
        """Keeps `rows`, moved up within the memory that there is."""
        assert self.keys is not None and self.values is not None
        for x in (self.keys, self.values):
            x[: len(rows), :, : self.columns.length] = x[:, :, : self.columns.length].index_select(0, rows)
        self.keys, self.values = self.keys[: len(rows)], self.values[: len(rows)]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns.seen, 0

    def get_seq_length(self) -> int:
        return self.columns.seen - 1  # to the model the newest column; what it may see there is the mask's affair

    def get_max_length(self) -> int:
        return -1


@dataclass
class Decoding:
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
