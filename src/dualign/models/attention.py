"""Attention over flat micro-batches: prompts among themselves, completions over their prompt and themselves.

Registered with transformers under the name PACKED. A call without a layout (decoding, evaluation by others) is plain
SDPA, so a model set to PACKED behaves as one set to "sdpa".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from dualign.models.packing import Layout

PACKED = "dualign_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query: (1, heads, L, d); key, value: (1, kv heads, L, d). Returns (1, L, heads, d)."""
    if layout is None:
        return sdpa_attention_forward(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None or kwargs.get("sliding_window") is not None:
        raise ValueError("packed attention knows no soft caps, sinks or windows")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (L, heads, d)
    of_prompts = _attend(
        _block(q, layout.prompt_PA), _block(k, layout.prompt_PA), _block(v, layout.prompt_PA), layout.prompt_mask, scale, dropout
    )
    # a completion's keys are its prompt's, then its own
    k_nS, v_nS = (
        torch.cat([_block(x, layout.prompt_PA).index_select(0, layout.row_prompt_n), _block(x, layout.row_nC)], 2)
        for x in (k, v)
    )
    of_rows = _attend(_block(q, layout.row_nC), k_nS, v_nS, layout.row_mask, scale, dropout)
    both = torch.cat([x.transpose(1, 2).flatten(0, 1) for x in (of_prompts, of_rows)])  # (P*A + n*C, heads, d)
    return both.index_select(0, layout.back_L)[None], None


def _block(x: Tensor, where: Tensor) -> Tensor:
    """(L, heads, d) flat -> (B, heads, S, d) padded."""
    return x.index_select(0, where.flatten()).unflatten(0, where.shape).transpose(1, 2)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    """Grouped-query attention; query heads that share a key head are stacked along the sequence, so keys are never
    repeated. On a CPU spelled out: SDPA's backward there takes twice as long."""
    b, heads, s, d = q.shape
    groups = heads // k.shape[1]
    if q.device.type != "cpu":
        return nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, scale=scale, dropout_p=dropout, enable_gqa=groups > 1
        )
    stacked = q.reshape(b, heads // groups, groups * s, d)
    score = (stacked @ k.transpose(-1, -2)).unflatten(2, (groups, s))
    bias = torch.zeros(mask.shape, dtype=score.dtype).masked_fill_(~mask, float("-inf"))
    weight = torch.softmax(torch.add(bias[:, :, None], score, alpha=scale), -1)
    if dropout:
        weight = nn.functional.dropout(weight, dropout)
    return (weight.flatten(2, 3) @ v).reshape(b, heads, s, d)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)
