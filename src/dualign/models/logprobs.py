"""log π(token | before) at chosen positions, without ever holding [tokens, vocabulary] in fp32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dualign.common import cpu
from dualign.models.compile import Fused, can_compile
from dualign.models.master import gradient_of

CHUNK = 512  # tokens whose logits are made by one matrix product, into one buffer
GPU_CHUNK = 2**31  # bytes of logits that are made at a time on a GPU
CACHED = 2**18  # logits that are turned into probabilities at a time: they stay in the cache of a core
BACK = 256  # tokens whose hidden states' gradient is one product: of more, a CPU's takes twice as long a token
SLICE = 2048  # entries of the vocabulary whose weight gradient is made at a time


@Fused
def target_logp(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) fp32 log softmax(logits)[target], and the log-normalisers (C,)."""
    wide = logits_CV.float()
    norm_C = torch.logsumexp(wide, -1)
    return wide.gather(1, target_C[:, None])[:, 0] - norm_C, norm_C


def _to_share(logits_CV: Tensor, norm_C: Tensor, grad_C: Tensor) -> None:
    """Overwrites logits with -softmax(logits) grad."""
    if logits_CV.device.type == "cpu":
        logits_CV.copy_(torch.softmax(logits_CV, -1) * -grad_C[:, None])  # vectorised for bf16; exp is not
    else:
        _by_normaliser(logits_CV, norm_C, grad_C)


@Fused
def _by_normaliser(logits_CV: Tensor, norm_C: Tensor, grad_C: Tensor) -> None:
    """In one pass, where softmax makes three."""
    logits_CV.copy_((logits_CV.float() - norm_C[:, None]).exp() * -grad_C[:, None])


class _TokenLogProb(Function):
    """log softmax(h W^T)[target] per row, in chunks whose logits are made again for backward unless they are kept: first
    touches of new memory cost a CPU more than the product. d logp / d logits = onehot(target) - p."""

    @staticmethod
    def forward(
        ctx: Any, hidden_MH: Tensor, weight_VH: Tensor, rounded_VH: Tensor, target_M: Tensor, keep: bool
    ) -> Tensor:
        logp, norm = (hidden_MH.new_empty(len(hidden_MH), dtype=torch.float32) for _ in range(2))
        ctx.kept = []
        for rows, _, logits in _logits(hidden_MH, rounded_VH, reuse=not keep):
            if keep:
                ctx.kept.append(logits)
            for part in _blocks(logits):
                logp[rows][part], norm[rows][part] = target_logp(logits[part], target_M[rows][part])
        ctx.save_for_backward(hidden_MH, weight_VH, target_M, norm)
        ctx.rounded = rounded_VH
        ctx.parameter = weight_VH if isinstance(weight_VH, nn.Parameter) else None
        return logp

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        hidden_MH, weight_VH, target_M, norm_M = ctx.saved_tensors
        rounded_VH = ctx.rounded
        grad_M = grads[0].to(rounded_VH.dtype)
        grad_hidden = torch.empty_like(hidden_MH)
        into, grad_weight, on_cpu = None, None, hidden_MH.device.type == "cpu"
        if ctx.needs_input_grad[1] and ctx.parameter is not None:
            into = gradient_of(ctx.parameter)  # no buffer of the vocabulary's size for every micro-batch
        elif ctx.needs_input_grad[1]:
            into = grad_weight = torch.zeros_like(weight_VH)
        for rows, h, d in _logits(hidden_MH, rounded_VH, ctx.kept):
            g, norm = grad_M[rows], norm_M[rows]
            for part in _blocks(d):
                _to_share(d[part], norm[part], g[part])
            d[torch.arange(len(d), device=d.device), target_M[rows]] += g  # scatter_add_ widens all of d on a CPU
            for part in _slices(len(d), BACK if on_cpu else len(d)):
                grad_hidden[rows][part] = (d[part] @ rounded_VH).to(grad_hidden.dtype)
            if into is not None:
                for entries in _slices(len(into), SLICE if on_cpu else len(into)):
                    into[entries] += d[:, entries].T @ h
        return grad_hidden, grad_weight, None, None, None


def _logits(
    hidden_MH: Tensor, weight_VH: Tensor, kept: list[Tensor] | None = None, reuse: bool = True
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(rows, their hidden states, their logits), chunk after chunk: those `kept`, which are used up, or made here; with
    `reuse` one chunk's are overwritten by the next one's."""
    large = weight_VH.device.type == "cuda" and can_compile()  # else they would be widened as a whole
    chunk = max(CHUNK, GPU_CHUNK // (len(weight_VH) * weight_VH.element_size())) if large else CHUNK
    buffer = weight_VH.new_empty(min(chunk, len(hidden_MH)), len(weight_VH)) if reuse and not kept else None
    for rows in _slices(len(hidden_MH), chunk):
        h = hidden_MH[rows].to(weight_VH.dtype)
        if kept:
            yield rows, h, kept.pop(0)
        else:
            yield rows, h, torch.mm(h, weight_VH.T, out=None if buffer is None else buffer[: len(h)])


def _room_for_logits(hidden_MH: Tensor, weight_VH: Tensor) -> bool:
    """Whether a GPU has room to keep all logits until backward and twice as much: nothing else shall lack memory."""
    if hidden_MH.device.type != "cuda":
        return False
    needed = 3 * len(hidden_MH) * len(weight_VH) * weight_VH.element_size()
    return needed < cpu.free_on_gpu(hidden_MH.device)


def _blocks(logits: Tensor) -> list[slice]:
    return _slices(len(logits), rows_in_cache(logits))


def rows_in_cache(logits_NV: Tensor) -> int:
    """How many rows of logits a CPU makes probabilities of at a time; a GPU, all."""
    return max(8, CACHED // logits_NV.shape[1]) if logits_NV.device.type == "cpu" else max(1, len(logits_NV))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(at, min(at + size, count)) for at in range(0, count, size)]


def token_logp(hidden_MH: Tensor, weight_VH: Tensor, rounded_VH: Tensor, target_M: Tensor) -> Tensor:
    """(M,) fp32 log-probs of the targets under a linear head. hidden_MH: (M, H); weight_VH: (V, H), which gets the
    gradient; products are those of `rounded_VH`, the same weight in the dtype to compute in; the normaliser is fp32."""
    keep = torch.is_grad_enabled() and _room_for_logits(hidden_MH, rounded_VH)
    return _TokenLogProb.apply(hidden_MH, weight_VH, rounded_VH, target_M, keep)
