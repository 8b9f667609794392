"""Linear layers with their weights laid out once for the CPU's matrix units.

A bf16 product on a CPU first rearranges the weight; in a decode step, with a few dozen rows, that costs more than the
product. While completions are sampled the weights do not change, so they are rearranged once. Same kernel, same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Product = Callable[[Tensor], Tensor]


def product(weight: Tensor, bias: Tensor | None, rows: int) -> Product:
    """x -> x W^T + b with the weight laid out for about `rows` rows, where the CPU build can; else the plain one."""
    if not supported(weight):
        return lambda x: nn.functional.linear(x.to(weight.dtype), weight, bias)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(torch.bfloat16), laid_out, bias, "none", [], "")


def supported(weight: Tensor) -> bool:
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@contextmanager
def laid_out_linears(model: nn.Module, rows: int) -> Iterator[None]:
    """While active, `model`'s bf16 linear layers compute with laid-out weights. Layers of other kinds are left alone."""
    replaced = [m for m in model.modules() if type(m) is nn.Linear and supported(m.weight)]
    try:
        for layer in replaced:
            layer.forward = product(layer.weight, layer.bias, rows)  # type: ignore[assignment, method-assign]
        yield
    finally:
        for layer in replaced:
            layer.__dict__.pop("forward", None)
