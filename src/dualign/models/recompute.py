"""Norms and feed-forward layers that keep less for backward: their inputs, and not what is quickly made again.

Same operations, same bits forward. On a CPU memory is what limits a micro-batch; on a GPU compiled layers do as much.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function


class _RMSNorm(Function):
    """y = w x / rms(x), with x and 1 / rms(x) kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (x * scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        along = grads[0] * normed
        grad_weight = along.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        mean = along.mul_(weight).mean(-1, keepdim=True)
        return (grads[0] * weight).sub_(normed.mul_(mean)).mul_(scale), grad_weight, None


class _SwiGLU(Function):
    """W_d (silu(W_g x) * W_u x), with x, W_g x and W_u x kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_w: Tensor, up_w: Tensor, down_w: Tensor) -> Tensor:
        low = x.to(gate_w.dtype)
        gate, up = nn.functional.linear(low, gate_w), nn.functional.linear(low, up_w)
        ctx.save_for_backward(low, gate, up, gate_w, up_w, down_w)
        ctx.dtype = x.dtype
        return nn.functional.linear(nn.functional.silu(gate).mul_(up), down_w)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        x, gate, up, gate_w, up_w, down_w = ctx.saved_tensors
        grad = grads[0].to(down_w.dtype)
        active = nn.functional.silu(gate)
        inner = grad @ down_w
        down_g = _outer(grad, active * up) if ctx.needs_input_grad[3] else None
        grad_up = active.mul_(inner)
        grad_gate = torch.ops.aten.silu_backward(inner.mul_(up), gate)
        gate_g = _outer(grad_gate, x) if ctx.needs_input_grad[1] else None
        up_g = _outer(grad_up, x) if ctx.needs_input_grad[2] else None
        return (grad_gate @ gate_w + grad_up @ up_w).to(ctx.dtype), gate_g, up_g, down_g


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of W in x W^T."""
    return grad.flatten(0, -2).T @ x.flatten(0, -2)


class LeanNorm(nn.Module):
    weight: Tensor
    variance_epsilon: float

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        plain = more or named or not (torch.is_grad_enabled() and x.requires_grad and x.dtype == self.weight.dtype)
        if plain:
            return super().forward(x, *more, **named)
        return _RMSNorm.apply(x, self.weight, self.variance_epsilon)


class LeanFeedForward(nn.Module):
    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor, *more: Any, **named: Any) -> Tensor:
        if more or named or not (torch.is_grad_enabled() and x.requires_grad):
            return super().forward(x, *more, **named)
        return _SwiGLU.apply(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


def keep_less(model: nn.Module) -> None:
    """Makes `model`'s plain RMS norms and gated feed-forward layers lean ones: those that, tried out, give the same."""
    module: Any
    for module in list(model.modules()):
        if hasattr(module, "variance_epsilon") and [n for n, _ in module.named_parameters()] == ["weight"]:
            _try(module, LeanNorm, len(module.weight))
        elif all(_plain(getattr(module, name, None)) for name in ("gate_proj", "up_proj", "down_proj")):
            _try(module, LeanFeedForward, module.gate_proj.in_features)


def _plain(layer: Any) -> bool:
    return type(layer) is nn.Linear and layer.bias is None


def _try(module: nn.Module, lean: Any, width: int) -> None:
    kind: Any = type(module)
    weight = next(module.parameters())
    small = torch.linspace(-2, 2, 3 * width, dtype=weight.dtype, device=weight.device).view(1, 3, width)
    for x in (small, 1000 * small):  # large enough for whoever caps what goes through it
        try:
            with torch.no_grad():
                expected = module(x)
            module.__class__ = _lean(lean, kind)
            with torch.enable_grad():
                same = torch.equal(module(x.requires_grad_()), expected)
        except (RuntimeError, TypeError, ValueError, AttributeError):  # it takes or gives something else
            same = False
        finally:
            module.__class__ = kind
        if not same:
            return
    module.__class__ = _lean(lean, kind)


@functools.cache
def _lean(lean: Any, kind: Any) -> Any:
    return type(kind.__name__, (lean, kind), {})
