"""Policies divided over processes by torch's FSDP2: of weights, gradients and optimizer state each holds a share.

The fp32 shares are the masters. What passes gather of a layer is rounded as `models/master.py` rounds, so a divided
policy gives the numbers of a whole one. Small weights of layers (norms, biases) are whole in every process. Nobody else
meets FSDP's tensors: optimizers step on local ones, files hold whole ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dualign.common.errors import UserError
from dualign.common.processes import Processes
from dualign.models.load import copied
from dualign.models.policy import Policy
from dualign.models.share import divided, gathered

SMALL = 2**20  # entries of a weight of no linear layer that is not divided


def mesh_of(kind: str, processes: Processes, device: torch.device) -> Any:
    """The processes as torch knows them: all in one row (full), or a row for each node (hybrid). Raises UserError where
    nodes do not have equally many, or how many is not known."""
    import torch.distributed as dist

    if not dist.is_initialized():  # one process alone
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1
        )
    if kind == "full":
        return dist.init_device_mesh(device.type, (processes.world,), mesh_dim_names=("shard",))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 0 if processes.world > 1 else 1))
    if not local:
        raise UserError(
            "train.shard: hybrid: set LOCAL_WORLD_SIZE to a node's processes, as torchrun and accelerate do"
        )
    if len(set(processes.gather([local]))) > 1 or processes.world % local:
        raise UserError("train.shard: hybrid wants equally many processes on every node; train.shard=full does without")
    shape = (processes.world // local, local)
    return dist.init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))


def divide(policy: Policy, mesh: Any) -> None:
    """Divides a policy in place: a group of weights for each layer, and one for all else. Weights in the host's memory
    come to the GPU group by group, as they are divided. Raises UserError for a model whose layers share weights."""
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    rounded = MixedPrecisionPolicy(param_dtype=policy.dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    blocks = _blocks(policy)
    _check_own_weights(policy, blocks)
    home = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    linear = set(policy.linears())
    if frozen := {p for p in linear if not p.requires_grad}:  # under adapters, which are others: a group has one dtype
        linear = frozen
        for p in frozen:
            p.data = p.data.to(policy.dtype)
    for block in blocks:
        others = set(block.parameters()) - linear
        small = {p for p in others if p.numel() < SMALL}
        for p in small:
            p.data = p.data.to(home, copy=True)  # on a CPU it is a part of the mapped file, all of which would stay
        for module in list(block.modules()):
            if any(p in others - small for p in module.parameters(recurse=False)):  # such as experts
                fully_shard(module, mesh=mesh, ignored_params=small)
        fully_shard(block, mesh=mesh, mp_policy=rounded, ignored_params=small)
    # Also after forward passes without a backward one: what stays gathered would miss the next step.
    fully_shard(policy, mesh=mesh, reshard_after_forward=True)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # sums: losses have their denominators
            module.set_force_sum_reduction_for_comms(True)


def _blocks(policy: Policy) -> list[nn.Module]:
    """The layers: members of the outermost lists."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList):
                found.extend(block for block in child if list(block.parameters()))
            else:
                look(child)

    look(policy.model)
    return found


def _check_own_weights(policy: Policy, blocks: Sequence[nn.Module]) -> None:
    owner: dict[nn.Parameter, int] = {}
    for i, block in enumerate(blocks):
        for p in block.parameters():
            if owner.setdefault(p, i) != i:
                raise UserError(
                    f"train.shard: layers of {policy.name} share weights, which cannot be divided; set it to none"
                )


def apart(policy: Policy) -> Policy:
    """Another policy with the same parameters (the tensors themselves), to be divided."""
    found: Policy = copied(policy, {id(p): p for p in policy.parameters()})
    return found


def gathers(policy: Policy, trained: Policy) -> None:
    """Lets go of the weights of a `policy` of which `trained` has the shares. It has them again within `policy.whole()`,
    which all processes enter together: to sample from it. Who only scores asks `trained` (`policy.divided`)."""
    shares, linear = dict(trained.named_parameters()), set(policy.linears())
    targets = [
        (p, shares[name], policy.dtype if p in linear else p.dtype)
        for name, p in policy.named_parameters()
        if divided(shares[name])  # small ones are the same tensors
    ]

    def let_go() -> None:
        for p, _, dtype in targets:
            p.data = torch.empty(0, dtype=dtype, device=p.device)
        policy.weights_changed(gone=True)

    @contextmanager
    def whole() -> Iterator[None]:
        try:
            with torch.inference_mode(False), torch.no_grad():
                for p, share, dtype in targets:
                    p.data = gathered(share.detach().to(dtype))
            yield
        finally:
            let_go()

    let_go()
    policy.whole = whole
    policy.divided = lambda: trained  # a module within a module would have its parameters twice
