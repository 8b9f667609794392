"""log π(token | before) at chosen positions, without ever holding [tokens, vocabulary] in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

CHUNK = 512  # tokens whose fp32 logits exist at one time
KEEP_BYTES = 256 * 2**20  # logits up to this size are kept (in the compute dtype) for backward, beyond it recomputed


class _TokenLogProb(Function):
    """log softmax(h W^T)[target] per row, in chunks. Forward keeps the log-normaliser; backward rebuilds the
    probabilities chunk by chunk: d logp / d logits = onehot(target) - p."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, target_M: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight_VH.to(dtype)
        keep = len(hidden_MH) * len(weight_VH) * dtype.itemsize <= KEEP_BYTES
        ctx.dtype, ctx.kept = dtype, []
        logp, norm = [], []
        for h, t in zip(hidden_MH.split(CHUNK), target_M.split(CHUNK), strict=True):
            logits = h.to(dtype) @ weight.T
            if keep and any(ctx.needs_input_grad):
                ctx.kept.append(logits)
            logits = logits.float()
            norm.append(torch.logsumexp(logits, -1))
            logp.append(logits.gather(1, t[:, None])[:, 0] - norm[-1])
        ctx.save_for_backward(hidden_MH, weight_VH, target_M, torch.cat(norm) if norm else hidden_MH.new_zeros(0))
        return torch.cat(logp) if logp else hidden_MH.new_zeros(0, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_MH, weight_VH, target_M, norm_M = ctx.saved_tensors
        grad_M, weight = grads[0], weight_VH.to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden_MH)
        grad_weight = torch.zeros_like(weight_VH, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for i, at in enumerate(range(0, len(hidden_MH), CHUNK)):
            rows = slice(at, at + CHUNK)
            h = hidden_MH[rows].to(ctx.dtype)
            logits = (ctx.kept[i] if ctx.kept else h @ weight.T).float()
            g = grad_M[rows, None].float()
            d = (logits - norm_M[rows, None]).exp_().mul_(-g)
            d.scatter_add_(1, target_M[rows, None], g)
            d = d.to(ctx.dtype)
            grad_hidden[rows] = (d @ weight).to(grad_hidden.dtype)
            if grad_weight is not None:
                grad_weight += d.T @ h
        ctx.kept = []
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), None, None


def token_logp(hidden_MH: Tensor, weight_VH: Tensor, target_M: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,) fp32 log-probs of the targets under a linear head. hidden_MH: (M, H); weight_VH: (V, H); products in
    `dtype`, normaliser in fp32."""
    return _TokenLogProb.apply(hidden_MH, weight_VH, target_M, dtype)  # type: ignore[no-any-return]
