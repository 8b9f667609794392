"""Where a number first was NaN or infinite: the weight or layer that a person has to look at."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dualign.models.share import gathered


def first_not_finite(model: nn.Module, forward: Callable[[], Any]) -> str:
    """The weight of `model` that is not finite, or else the first layer of which `forward` made a number that is not; in
    words, empty where all is finite."""
    for name, p in model.named_parameters():
        if not gathered(p.isfinite().all()):  # all processes hear of it, and look no further
            return f"the weight {name} is not finite"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and any(not t.isfinite().all() for t in _tensors(output)):
                found.append(f"the first layer with a number that is not finite is {name} ({type(module).__name__})")

        return look

    hooks = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def first_gradient(named: Iterable[tuple[str, nn.Parameter]]) -> str:
    """The first gradient that was not finite, in words: the backward pass meets the last layer first."""
    wrong = [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()]
    return f"the first gradient that is not finite is that of {wrong[-1]}" if wrong else ""


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    return [t for value in values for t in _tensors(value)]
