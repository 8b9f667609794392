"""From logits to tokens: temperature, top-p and one uniform each, without holding or scanning a softmax of the whole
vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dualign.models.compile import Fused
from dualign.models.logprobs import rows_in_cache, target_logp
from dualign.rollout.base import Sampling

BLOCK = 256  # two-level inverse CDF: a sum per block of the vocabulary, then a scan inside one block


def choose(logits_NV: Tensor, s: Sampling, draw_N: Tensor) -> tuple[Tensor, Tensor]:
    """The next token (N,) at temperature and top-p by inverse CDF from one uniform each, and its log-prob under the
    untempered model (N,)."""
    if s.temperature > 0 and s.top_p == 1:
        return draw_from(logits_NV, s.temperature, draw_N)
    if s.temperature == 0:
        token_N = logits_NV.argmax(-1)
    else:
        drawn = [
            inverse_cdf(nucleus(torch.softmax(logits.float() / s.temperature, -1), s.top_p), draw)
            for logits, draw in zip(_few(logits_NV, logits_NV), _few(draw_N, logits_NV), strict=True)
        ]
        token_N = torch.cat(drawn)
    parts = zip(_few(logits_NV, logits_NV), _few(token_N, logits_NV), strict=True)
    return token_N, torch.cat([target_logp(*part)[0] for part in parts])


def _few(x: Tensor, logits_NV: Tensor) -> Sequence[Tensor]:
    """On a CPU a few rows at a time, so that a row's passes over the vocabulary stay in cache."""
    return x.split(rows_in_cache(logits_NV))


def nucleus(weight_NV: Tensor, top_p: float) -> Tensor:
    """Zero all but the smallest set of most likely tokens that holds `top_p` of the mass."""
    ordered, order = weight_NV.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(weight_NV).scatter(1, order, ordered.masked_fill(before >= top_p, 0))


def draw_from(logits_NV: Tensor, temperature: float, draw_N: Tensor) -> tuple[Tensor, Tensor]:
    """The token at which the cumulative softmax(logits / temperature) passes the uniform, and its untempered log-prob;
    the softmax is never held as a whole."""
    parts = [_masses(part, temperature) for part in _few(logits_NV, logits_NV)]
    top_N1, mass_NB, norm_N = map(torch.cat, zip(*parts, strict=True))
    token_N = _two_levels(
        mass_NB, lambda block_N: ((_block(logits_NV, block_N, -torch.inf).float() - top_N1) / temperature).exp(), draw_N
    )
    return token_N, logits_NV.gather(1, token_N[:, None])[:, 0].float() - norm_N


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
def _masses(logits_NV: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The largest logit (N, 1); relative to its own, the tempered mass of each block of the vocabulary (N, B); the
    untempered log-normaliser (N,)."""
    wide_NV = logits_NV.float()
    top_N1 = wide_NV.amax(-1, keepdim=True)
    below_NV = wide_NV - top_N1
    if temperature == 1:
        mass_NB = _sums(below_NV.exp_())
        return top_N1, mass_NB, top_N1[:, 0] + mass_NB.sum(-1).log()
    norm_N = top_N1[:, 0] + below_NV.exp().sum(-1).log()
    return top_N1, _sums(below_NV.div_(temperature).exp_()), norm_N


def _sums(weight_NV: Tensor) -> Tensor:
    """(N, B): of each BLOCK tokens."""
    return torch.nn.functional.pad(weight_NV, (0, -weight_NV.shape[1] % BLOCK)).unflatten(1, (-1, BLOCK)).sum(-1)


def _block(value_NV: Tensor, block_N1: Tensor, beyond: float) -> Tensor:
    """(N, BLOCK): each row's values in its block."""
    at_NC = block_N1 * BLOCK + torch.arange(BLOCK, device=value_NV.device)
    last = value_NV.shape[1] - 1
    return value_NV.gather(1, at_NC.clamp(max=last)).masked_fill(at_NC > last, beyond)
