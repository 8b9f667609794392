"""Attention over flat micro-batches: prompts among themselves, completions over their prompt and themselves.

Registered with transformers under the name PACKED. A call without a layout (decoding, evaluation by others) is plain
SDPA, so a model set to PACKED behaves as one set to "sdpa".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dualign.models.packing import Layout, Segments

PACKED = "dualign_packed"


@torch.compiler.disable  # its shapes differ with every micro-batch; the layer around it is compiled on a GPU
def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | Segments | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, L, d); key, value: (1, kv heads, L, d). Returns (1, L, heads, d)."""
    if layout is None:
        if query.shape[2] == 1 and query.shape[1] > key.shape[1]:
            return _one_query(query, key, value, attention_mask, scaling), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("sliding_window") is not None:
        raise ValueError("packed attention knows no soft caps, sinks or windows")
    query, key = query.to(value.dtype), key.to(value.dtype)  # rotated in fp32, multiplied under autocast in bf16
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layout, Segments):
        if dropout:
            raise ValueError("attention over segments knows no dropout")
        flat = (x[0].transpose(0, 1) for x in (query, key, value))
        return _Flash.apply(*flat, layout, scale)[None], None
    prompts, rows = layout.prompt_PA.shape, layout.row_nC.shape
    cut = layout.prompt_PA.numel()

    def blocks(x: Tensor) -> tuple[Tensor, Tensor]:  # (1, heads, L, d) -> (P, heads, A, d), (n, heads, C, d)
        padded = _Spread.apply(x[0].transpose(0, 1), layout.spread, layout.back_L)
        of_prompts, of_rows = padded[:cut].unflatten(0, prompts), padded[cut:].unflatten(0, rows)
        return of_prompts.transpose(1, 2), of_rows.transpose(1, 2)

    (q_P, q_n), (k_P, k_n), (v_P, v_n) = blocks(query), blocks(key), blocks(value)
    out_P = _attend(q_P, k_P, v_P, layout.prompt_mask, scale, dropout)
    # a completion's keys are its prompt's, then its own
    k_n, v_n = (
        torch.cat([of_prompts.index_select(0, layout.row_prompt_n), own], 2)
        for of_prompts, own in ((k_P, k_n), (v_P, v_n))
    )
    out_n = _attend(q_n, k_n, v_n, layout.row_mask, scale, dropout)
    both = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (out_P, out_n)])  # (P*A + n*C, heads, d)
    return _Collect.apply(both, layout.back_L)[None], None


def _one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Decoding: the query heads that share a key head line up as its queries, so that keys are never repeated."""
    n, heads, _, d = query.shape
    lined_up = query.reshape(n, key.shape[1], heads // key.shape[1], d)
    out = nn.functional.scaled_dot_product_attention(lined_up, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, 1, heads, value.shape[3])


class _Flash(Function):
    """Attention over flat tokens by FlashAttention's kernels: no padding, no masks, keys never repeated. A completion
    attends to itself and to its prompt in two calls, whose outputs are put together by their log-normalisers; backward
    runs through both with the normaliser of the whole, which makes each its part of the exact gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, at: Segments, scale: float) -> Tensor:
        """q: (L, heads, d); k, v: (L, kv heads, d). Returns (L, heads, d)."""
        out, norm_hL, seed = _flash(q, k, v, at.ends, at.ends, at.longest, at.longest, True, scale)
        q_n = q.index_select(0, at.row_at)
        k_P, v_P = k.index_select(0, at.prompt_at), v.index_select(0, at.prompt_at)
        sizes = (at.row_ends, at.prompt_ends, at.row_longest, at.prompt_longest)
        out_n, norm_hn, seed_n = _flash(q_n, k_P, v_P, *sizes, False, scale)
        own_hn = norm_hL.index_select(1, at.row_at)
        both_hn = torch.logaddexp(own_hn, norm_hn)
        share_own, share = ((x - both_hn).exp().T[:, :, None] for x in (own_hn, norm_hn))
        out_n = (out.index_select(0, at.row_at) * share_own + out_n * share).to(out.dtype)
        out = out.index_copy(0, at.row_at, out_n)
        norm_hL = norm_hL.index_copy(1, at.row_at, both_hn)
        ctx.save_for_backward(q, k, v, q_n, k_P, v_P, out, norm_hL, out_n, both_hn, *seed, *seed_n)
        ctx.at, ctx.scale = at, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, q_n, k_P, v_P, out, norm_hL, out_n, both_hn, *seeds = ctx.saved_tensors
        at, scale, grad = ctx.at, ctx.scale, grads[0].contiguous()
        sizes = (at.ends, at.ends, at.longest, at.longest)
        dq, dk, dv = _flash_backward(grad, q, k, v, out, norm_hL, *sizes, True, scale, seeds[:2])
        sizes = (at.row_ends, at.prompt_ends, at.row_longest, at.prompt_longest)
        grad_n = grad.index_select(0, at.row_at)
        dq_n, dk_P, dv_P = _flash_backward(grad_n, q_n, k_P, v_P, out_n, both_hn, *sizes, False, scale, seeds[2:])
        dq.index_add_(0, at.row_at, dq_n)
        dk.index_add_(0, at.prompt_at, dk_P)
        dv.index_add_(0, at.prompt_at, dv_P)
        return dq, dk, dv, None, None


def _flash(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_max: int, k_max: int, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Output (L, heads, d), log-normalisers (heads, L), and the state of a dropout that is not used."""
    out, norm, seed, unused, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_ends, k_ends, q_max, k_max, 0.0, causal, False, scale=scale
    )
    return out, norm, (seed, unused)


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, q_ends: Tensor, k_ends: Tensor,
    q_max: int, k_max: int, causal: bool, scale: float, seed: Sequence[Tensor],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, norm.contiguous(), q_ends, k_ends, q_max, k_max, 0.0, causal, *seed, scale=scale
    )
    return dq, dk, dv


class _Spread(Function):
    """Flat tokens -> padded slots. Every token has one slot of its own; what flows back through padding is zero (it is
    masked as a key and never read as an output), so the gradient is a gather too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, spread)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0].index_select(0, ctx.saved_tensors[0]), None, None


class _Collect(Function):
    """Padded slots -> flat tokens."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        ctx.slots = len(padded)
        return padded.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        out = grads[0].new_zeros(ctx.slots, *grads[0].shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], grads[0]), None


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """Grouped-query attention. On a CPU spelled out, since SDPA's backward there takes twice as long; query heads that
    share a key head are stacked along the sequence, so keys are never repeated."""
    if q.device.type != "cpu":
        return _attend_by_sdpa(q, k, v, mask, scale, dropout)
    b, heads, s, d = q.shape
    groups = heads // k.shape[1]
    stacked = q.reshape(b, heads // groups, groups * s, d)
    score = (stacked @ k.transpose(-1, -2)).unflatten(2, (groups, s))
    bias = torch.zeros(mask.shape, dtype=score.dtype).masked_fill_(~mask, float("-inf"))
    weight = torch.softmax(torch.add(bias[:, :, None], score, alpha=scale), -1)
    if dropout:
        weight = nn.functional.dropout(weight, dropout)
    return (weight.flatten(2, 3) @ v).reshape(b, heads, s, d)


def _attend_by_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """Keys and values are repeated: with a mask, CUDA's fused kernels know no grouped queries, and SDPA would fall back
    to one that keeps every score."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2) for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
