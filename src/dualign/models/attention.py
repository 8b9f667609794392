"""Attention over flat micro-batches: prompts among themselves, completions over their prompt and themselves.

Registered with transformers under the name PACKED. A call without a layout (decoding, evaluation by others) is plain
SDPA, so a model set to PACKED behaves as one set to "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dualign.models.packing import Layout, Segments

PACKED = "dualign_packed"


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
        of_all_heads = attention_mask is None or attention_mask.shape[1] == 1
        if query.shape[2] == 1 and query.shape[1] >= key.shape[1] and of_all_heads:
            return one_query(query, key, value, attention_mask, scaling), None
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
        q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        sizes = (layout.ends, layout.key_at, layout.key_ends, layout.longest, layout.key_longest)
        return attend_segments(q, k, v, *sizes, scale)[0][None], None
    return _over_blocks(query, key, value, layout, scale, dropout), None


@torch.compiler.disable  # its shapes differ with every micro-batch; the layer around it is compiled on a GPU
def _over_blocks(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float, dropout: float) -> Tensor:
    """Attention in padded blocks of prompts and completions, told by masks who sees whom."""
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
    return _Collect.apply(both, layout.back_L)[None]


@torch.compiler.disable  # SDPA chooses among kernels by what it is given
def one_query(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None) -> Tensor:
    """Decoding: the query heads that share a key head line up as its queries, so that keys are never repeated."""
    n, heads, _, d = query.shape
    lined_up = query.reshape(n, key.shape[1], heads // key.shape[1], d)
    out = nn.functional.scaled_dot_product_attention(lined_up, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(n, 1, heads, value.shape[3])


@torch.library.custom_op("dualign::attend_segments", mutates_args=())
def attend_segments(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, key_at: Tensor, key_ends: Tensor, longest: int, key_longest: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention over flat tokens by FlashAttention's kernels: no padding, no masks, keys never repeated for heads.
    q: (L, heads, d); k, v: (L, kv heads, d); the rest as in `Segments`. Returns (L, heads, d) and the logarithms of the
    normalisers (heads, L). One operation to compilers, which put what comes before and after into kernels of their own."""
    k, v = k.index_select(0, key_at), v.index_select(0, key_at)
    return _flash(q, k, v, ends, key_ends, longest, key_longest, scale)


@attend_segments.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *sizes: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("dualign::attend_segments_backward", mutates_args=())
def _attend_segments_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, ends: Tensor, key_at: Tensor,
    key_ends: Tensor, longest: int, key_longest: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    keys, values = k.index_select(0, key_at), v.index_select(0, key_at)
    dq, dk, dv = _flash_backward(grad, q, keys, values, out, norm, ends, key_ends, longest, key_longest, scale)
    dk, dv = (  # a prompt's keys hear from all its completions, in fp32
        torch.zeros_like(x, dtype=torch.float32).index_add_(0, key_at, dx.float()).to(x.dtype)
        for x, dx in ((k, dk), (v, dv))
    )
    return dq, dk, dv


@_attend_segments_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ends, key_at, key_ends, *ctx.numbers = inputs
    ctx.save_for_backward(q, k, v, *output, ends, key_at, key_ends)


def _recall(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = _attend_segments_backward(grad.contiguous(), *ctx.saved_tensors, *ctx.numbers)
    return (*grads, *[None] * 6)


attend_segments.register_autograd(_recall, setup_context=_remember)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, q_ends: Tensor, k_ends: Tensor, q_max: int, k_max: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Output (L, heads, d) and log-normalisers (heads, L), each segment's last query at its last key."""
    out, norm, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, q_ends, k_ends, q_max, k_max, 0.0, True, False, scale=scale
    )
    return out, norm


def _flash_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, norm: Tensor, q_ends: Tensor, k_ends: Tensor,
    q_max: int, k_max: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dropout = [torch.empty(shape, dtype=torch.uint64, device=q.device) for shape in (2, ())]  # unused state
    dq, dk, dv = torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, norm, q_ends, k_ends, q_max, k_max, 0.0, True, *dropout, scale=scale
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
