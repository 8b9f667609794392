"""Compiled functions for CUDA tensors: casts, norms, activations and sums in one pass over memory instead of many."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)
Function = Callable[..., Any]
warnings.filterwarnings("ignore", r"\s*Online softmax is disabled")  # a note to torch's own developers


class Fused:
    """`function`, compiled where its first tensor is on a CUDA device; elsewhere, and on a machine that cannot compile
    (no Triton, no C compiler), as it is."""

    def __init__(self, function: Function) -> None:
        self.plain = function
        self.compiled: Function = torch.compile(function, dynamic=True)
        functools.update_wrapper(self, function)

    def __call__(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        usable = tensor.device.type == "cuda" and can_compile()
        return (self.compiled if usable else self.plain)(tensor, *args, **kwargs)


@functools.cache
def can_compile() -> bool:
    """Whether functions and their gradients can be compiled for the CUDA device, found out by trying."""
    try:
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(8, device="cuda", requires_grad=True)
            torch.compile(lambda x: (x.exp() * 2).sum())(x).backward()
    except Exception as error:  # compilers fail in many ways, and nothing depends on them
        log.warning("going on without compiled kernels: %s", str(error).strip().splitlines()[0])
        return False
    return True


def compile_layers(base: nn.Module) -> None:
    """Compiles a decoder's layers for flat micro-batches on a CUDA device; they share one compilation, and attention
    stays out of it. Other calls (decoding, plain rows) go the plain way."""
    layers = getattr(base, "layers", None)
    if isinstance(layers, nn.ModuleList) and can_compile():
        for layer in layers:
            kind: Any = type(layer)
            layer.__class__ = _compiled(kind)


@functools.cache
def _compiled(kind: Any) -> Any:
    plain: Function = kind.forward
    compiled = torch.compile(plain, dynamic=True)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return (compiled if kwargs.get("layout") is not None else plain)(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})
