"""Compiled functions for CUDA tensors: casts, norms, activations and sums in one pass over memory instead of many."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dualign.common.errors import out_of_memory
from dualign.models.attention import PACKED

log = logging.getLogger(__name__)
Function = Callable[..., Any]
LAYER_NUMBER = r".*\.layer_idx"
warnings.filterwarnings("ignore", r"\s*Online softmax is disabled")  # a note to torch's own developers


class Fused:
    """`function`, compiled where its first tensor is on a CUDA device; elsewhere, and on a machine that cannot compile
    (no Triton, no C compiler), as it is. Sizes that never change, such as the vocabulary's, are constants to it: dividing
    every index by one that may change takes longer than the memory does."""

    def __init__(self, function: Function) -> None:
        self.plain = function
        functools.update_wrapper(self, function)

    @functools.cached_property
    def compiled(self) -> Function:
        return torch.compile(self.plain)  # when it is used: the compiler is 40 MB of modules

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
        log.warning("continuing without compiled kernels: %s", str(error).strip().splitlines()[0])
        return False
    return True


def compile_layers(base: nn.Module) -> None:
    """Compiles a decoder's layers for flat micro-batches and for steps of decoding on a CUDA device; they share one
    compilation of each. Other calls (prompts before decoding, plain rows) go the plain way, and all do once compiling
    one of them has failed."""
    layers, config = getattr(base, "layers", None), getattr(base, "config", None)
    packed = getattr(config, "_attn_implementation", None) == PACKED
    if packed and isinstance(layers, nn.ModuleList) and can_compile():
        # Else every layer's number makes a program of its own; what else a layer holds, a head's size, is a constant.
        named = torch.compiler.config.dynamic_sources.split(",")
        torch.compiler.config.dynamic_sources = ",".join({*filter(None, named), LAYER_NUMBER})
        for layer in layers:
            kind: Any = type(layer)
            layer.__class__ = _compiled(kind)


@functools.cache
def _compiled(kind: Any) -> Any:
    plain: Function = kind.forward
    compiled, works = torch.compile(plain, dynamic=True), True

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        nonlocal works
        flat = kwargs.get("layout") is not None
        if works and (flat or any(getattr(x, "one_column", False) for x in kwargs.values())):
            try:
                return compiled(self, *args, **kwargs)
            except torch._dynamo.exc.TorchDynamoException as error:
                if out_of_memory(error):
                    raise
                log.warning("continuing without compiled layers: %s", str(error).strip().splitlines()[0])
                works = False  # what a step has done by now, its column of the cache, is done again to the same end
        return plain(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})
