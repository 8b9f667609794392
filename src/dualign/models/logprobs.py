"""log π(token | before) at chosen positions, without ever holding [tokens, vocabulary] in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dualign.models.master import gradient_of

CHUNK = 512  # tokens whose logits are made by one matrix product
BLOCK = 8  # tokens whose logits are turned into probabilities at a time: they stay in the cache of a core
KEEP_BYTES = 128 * 2**20  # logits up to this size are kept (in the compute dtype) for backward, beyond it recomputed


class _TokenLogProb(Function):
    """log softmax(h W^T)[target] per row, in chunks. d logp / d logits = onehot(target) - p."""

    @staticmethod
    def forward(ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, target_M: Tensor, dtype: torch.dtype) -> Tensor:
        weight = weight_VH.to(dtype)
        small = len(hidden_MH) * len(weight_VH) * dtype.itemsize <= KEEP_BYTES
        ctx.dtype, ctx.kept = dtype, []
        logp = hidden_MH.new_empty(len(hidden_MH), dtype=torch.float32)
        for rows in _slices(len(hidden_MH), CHUNK):
            logits = hidden_MH[rows].to(dtype) @ weight.T
            if small and any(ctx.needs_input_grad):
                ctx.kept.append(logits)
            for part in _slices(len(logits), _block(logits)):
                wide = logits[part].float()
                chosen = wide.gather(1, target_M[rows][part, None])[:, 0]
                logp[rows][part] = chosen - torch.logsumexp(wide, -1)
        ctx.save_for_backward(hidden_MH, weight_VH, target_M)
        ctx.parameter = weight_VH if isinstance(weight_VH, nn.Parameter) else None
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        hidden_MH, weight_VH, target_M = ctx.saved_tensors
        weight = weight_VH.to(ctx.dtype)
        grad_M = grads[0].to(ctx.dtype)
        grad_hidden = torch.empty_like(hidden_MH)
        into, grad_weight = None, None
        if ctx.needs_input_grad[1] and ctx.parameter is not None:
            into = gradient_of(ctx.parameter)  # no buffer of the vocabulary's size for every micro-batch
        elif ctx.needs_input_grad[1]:
            into = grad_weight = torch.zeros_like(weight_VH)
        for i, rows in enumerate(_slices(len(hidden_MH), CHUNK)):
            h, g = hidden_MH[rows].to(ctx.dtype), grad_M[rows, None]
            # kept logits may be overwritten: a second backward through them is an error by autograd's own rules
            d = ctx.kept[i] if ctx.kept else h @ weight.T
            for part in _slices(len(d), _block(d)):
                d[part] = torch.softmax(d[part], -1).mul_(-g[part])
            at = torch.arange(len(d), device=d.device)
            d[at, target_M[rows]] += g[:, 0]
            grad_hidden[rows] = (d @ weight).to(grad_hidden.dtype)
            if into is not None:
                into += d.T @ h
        ctx.kept = []
        return grad_hidden, grad_weight, None, None


def _slices(count: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def _block(logits: Tensor) -> int:
    return BLOCK if logits.device.type == "cpu" else CHUNK


def token_logp(hidden_MH: Tensor, weight_VH: Tensor, target_M: Tensor, dtype: torch.dtype) -> Tensor:
    """(M,) fp32 log-probs of the targets under a linear head. hidden_MH: (M, H); weight_VH: (V, H); products in
    `dtype`, normaliser in fp32."""
    return _TokenLogProb.apply(hidden_MH, weight_VH, target_M, dtype)
