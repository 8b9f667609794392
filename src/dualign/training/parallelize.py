"""How models are laid out on a machine. Every trick that only a CPU or a GPU needs is behind this door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualign import assets
from dualign.common.processes import Processes
from dualign.config import Config
from dualign.models.compile import compile_layers
from dualign.models.load import load_reference
from dualign.models.master import Masters
from dualign.models.policy import Policy, load_model
from dualign.models.recompute import keep_less
from dualign.models.shard import apart, divide, gathers, mesh_of
from dualign.models.tokenizer import Tokenizer


def load_policy(config: Config, device: torch.device) -> tuple[Policy, Tokenizer]:
    """The policy with its weights as they are stored, on its device: whoever tries it out sees exact ones."""
    model, tokenizer = load_model(config.model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.to(device)
    return Policy(model, config.model.precision, config.train.prefix_sharing), tokenizer


def frozen_reference(config: Config, policy: Policy, tokenizer: Tokenizer) -> Policy | None:
    """π_0: the model that model.reference names, or `policy` as it is loaded. None where that is the policy without its
    adapters."""
    m = config.model
    if m.reference is not None:
        model = load_reference(m, tokenizer).to(policy.device)
        return Policy(model, m.precision, config.train.prefix_sharing, "model.reference").freeze()
    return policy.frozen_copy() if m.lora is None else None


def parallelize(
    policy: Policy, critic: Policy | None, reference: Policy | None, config: Config, processes: Processes
) -> tuple[Policy, Masters]:
    """Readies models for training. Returns the policy to train, and its and the critic's masters.

    Whole: bf16 weights beside fp32 masters, in halves where the optimizer opens those that it steps on; π_0 rests in a
    file (CPU) or in the host's memory (GPU). Divided (train.shard): `policy` itself is whole again only while one
    samples from it. On a CPU less is kept for backward; on a GPU layers are compiled."""
    on_cpu, divided = policy.device.type == "cpu", config.train.shard != "none"
    modules = [m for m in (policy, critic) if m is not None]
    exact: dict[Any, Tensor] = {}
    if not divided:
        for module in modules:
            exact |= module.round()
    for module in modules:
        if on_cpu:
            keep_less(module.base)
    if config.train.compile and not on_cpu:
        for module in [*modules, *([reference] if reference else [])]:
            compile_layers(module.base)
    if divided:
        mesh, trained = mesh_of(config.train.shard, processes, policy.device), apart(policy)
        for module in filter(None, (trained, critic, reference)):
            divide(module, mesh)
        gathers(policy, trained)
        policy, modules[0] = trained, trained
    elif reference is not None and on_cpu:
        reference.move_to_file(assets.cache_dir())
    elif reference is not None:
        reference.move_to_host()
    return policy, Masters(list(modules), exact, halved=config.train.optimizer == "adafactor")
