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
        if tensor.device.type != "cuda" or not works:
            return self.plain(tensor, *args, **kwargs)
        try:
            return self.compiled(tensor, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as error:
            give_up(error)
            return self.plain(tensor, *args, **kwargs)


works = True  # until compiling has failed


def give_up(error: Exception) -> None:
    global works
    works = False
    log.warning("going on without compiled kernels: %s", str(error).strip().splitlines()[0])


def compile_layers(base: nn.Module) -> None:
    """Compiles a decoder's layers for flat micro-batches on a CUDA device; they share one compilation, and attention
    stays out of it. Other calls (decoding, plain rows) go the plain way."""
    layers = getattr(base, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        return
    for layer in layers:
        layer.forward = _flat_only(Fused(layer.forward))


def _flat_only(fused: Fused) -> Function:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return (fused if kwargs.get("layout") is not None else fused.plain)(*args, **kwargs)

    return forward
