"""fp32 master weights for parameters that compute in bf16, and gradients that are added up where they are kept.

Autocast rounds the weights of linear layers to bf16 in every forward pass. Rounding them once per optimizer step gives
the same numbers without the passes over memory: the module holds the rounded weight, the optimizer the master, and each
gradient goes to the master, in fp32, the moment it is made. Where memory is dear, masters are whole only while somebody
needs them: else the rounded weight is their upper half, and only the lower one is kept beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from dualign.models.share import Share, divided


def linear_weights(module: nn.Module, keep: Tensor | None = None) -> list[nn.Parameter]:
    """The parameters of linear layers, but of the one whose weight is `keep` (a head, which may be the embedding)."""
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and m.weight is not keep]
    return list(dict.fromkeys(p for layer in layers for p in layer.parameters(recurse=False)))


def round_linears(module: nn.Module, keep: Tensor | None = None) -> dict[nn.Parameter, Tensor]:
    """Rounds the parameters of linear layers (but `keep`) to bf16, in place. Returns the unrounded tensors by
    parameter."""
    exact = {p: p.data for p in linear_weights(module, keep) if p.dtype == torch.float32}
    for p in exact:
        p.data = p.data.to(torch.bfloat16)
    return exact


@contextmanager
def widened(module: nn.Module) -> Iterator[None]:
    """While active, rounded parameters are in fp32, with the values that rounding left."""
    rounded = {p: p.data for p in module.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    for p, value in rounded.items():
        p.data = value.float()
    try:
        yield
    finally:
        for p, value in rounded.items():
            p.data = value


class Masters:
    """What the optimizer steps on: for every trainable parameter itself, or its fp32 master. Values are read and written
    within `opened` or `whole`; gradients are there at all times. `halved`: masters are kept as the halves that rounding
    makes."""

    def __init__(self, modules: list[nn.Module], exact: dict[nn.Parameter, Tensor], halved: bool = False) -> None:
        self.rounded: dict[nn.Parameter, nn.Parameter] = {}  # by master
        self.lower: dict[nn.Parameter, Tensor] = {}  # where masters are halved, by master: what rounding took off
        self.groups: list[list[nn.Parameter]] = []  # one list per module
        self.named: dict[str, nn.Parameter] = {}
        self.shares: dict[nn.Parameter, Share] = {}  # by master, where that is this process's share of a weight
        for i, module in enumerate(modules):
            self.groups.append([])
            for name, p in module.named_parameters():
                if not p.requires_grad:
                    continue
                master = p
                if divided(p):
                    share = Share(p)
                    master = nn.Parameter(share.rows)
                    self.shares[master] = share
                if p in exact:
                    master = nn.Parameter(exact.pop(p))
                    self.rounded[master] = p
                    p.register_post_accumulate_grad_hook(_handing_on_to(master))
                    if halved:
                        self.lower[master] = remainder(master.data, p.data)
                        master.data = _no_memory(p)
                self.groups[-1].append(master)
                self.named[f"{i}.{name}"] = master

    @contextmanager
    def opened(self, masters: Sequence[nn.Parameter]) -> Iterator[None]:
        """While active, these masters are there. Afterwards their rounded weights follow them."""
        pairs = [(m, self.rounded[m]) for m in masters if m in self.rounded]
        for master, p in pairs:
            if master in self.lower:
                master.data = joined(p.data, self.lower[master])
        try:
            yield
        finally:
            if pairs:
                torch._foreach_copy_([p.data for _, p in pairs], [master.data for master, _ in pairs])
            for master, p in pairs:
                if master in self.lower:
                    self.lower[master].copy_(remainder(master.data, p.data))
                    master.data = _no_memory(p)

    def whole(self) -> AbstractContextManager[None]:
        """The same for all masters at once."""
        return self.opened(list(self.rounded))

    def make_gradients(self) -> None:
        """All gradients, as zeros where there is none yet."""
        for master in self.named.values():
            gradient_of(master)

    def exchange_gradients(self, world: int) -> None:
        """The sum over `world` processes, in fp32: of whole parameters here, a process that had no rows contributing
        zeros; that of divided ones was made in the backward pass, and is handed on to their masters."""
        for master in self.named.values():
            if master in self.shares:
                grad = self.shares[master].parameter.grad
                master.grad = None if grad is None else grad.to_local()
            elif world > 1:
                torch.distributed.all_reduce(gradient_of(master))

    def clear_gradients(self, keep: bool) -> None:
        """`keep`: the buffers, as zeros."""
        for master in self.named.values():
            if master.grad is not None and keep and master not in self.shares:
                master.grad.zero_()
            else:
                master.grad = None
        for share in self.shares.values():
            share.parameter.grad = None


def remainder(master: Tensor, rounded: Tensor) -> Tensor:
    """int16: what is left of fp32 numbers once their bf16 rounding is taken off, as a difference of bit patterns. At most
    half a bf16 step, 32,768 units in the last place, of which int16 has one less on one side: an exact tie that was
    rounded down, one number in some 100,000, moves by 1 unit (2^-24 of itself)."""
    upper = rounded.view(torch.int16).int().bitwise_left_shift_(16)
    return (master.view(torch.int32) - upper).clamp_(max=32767).short()


def _no_memory(p: Tensor) -> Tensor:
    """fp32, of the shape of `p`."""
    return torch.zeros((), device=p.device).expand_as(p)


def joined(rounded: Tensor, lower: Tensor) -> Tensor:
    """The fp32 numbers that `rounded` and their `remainder` are of."""
    return rounded.view(torch.int16).int().bitwise_left_shift_(16).add_(lower).view(torch.float32)


def gradient_of(p: nn.Parameter) -> Tensor:
    """Where the gradient of `p` is added up; zeros if there is none yet."""
    if p.grad is None:
        p.grad = torch.zeros_like(p)
    return p.grad


class _Lookup(Function):
    """An embedding whose backward touches the rows it read, not a gradient of the vocabulary's size."""

    @staticmethod
    def forward(ctx: Any, weight_VH: nn.Parameter, ids: Tensor, padding_id: int | None) -> Tensor:
        ctx.parameter, ctx.ids, ctx.padding_id = weight_VH, ids, padding_id
        return nn.functional.embedding(ids, weight_VH)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        grad = grads[0]
        if ctx.padding_id is not None:
            grad = grad.masked_fill((ctx.ids == ctx.padding_id)[..., None], 0)
        into = gradient_of(ctx.parameter)
        into.index_add_(0, ctx.ids.flatten(), grad.flatten(0, -2).to(into.dtype))
        return None, None, None


class LightEmbedding(nn.Embedding):
    """Adds its weight's gradient up in place."""

    def forward(self, input: Tensor) -> Tensor:
        if self.weight.requires_grad and torch.is_grad_enabled():
            return _Lookup.apply(self.weight, input, self.padding_idx)
        return super().forward(input)

    @staticmethod
    def take(embedding: nn.Module) -> None:
        """Makes a plain embedding one of these."""
        if type(embedding) is nn.Embedding and embedding.max_norm is None and not embedding.scale_grad_by_freq:
            embedding.__class__ = LightEmbedding


def _handing_on_to(master: nn.Parameter):  # type: ignore[no-untyped-def]
    def hand_on(p: Tensor) -> None:
        assert p.grad is not None
        if master.grad is None:
            master.grad = p.grad.float()
        else:
            master.grad += p.grad
        p.grad = None

    return hand_on
