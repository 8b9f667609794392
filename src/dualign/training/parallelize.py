"""How models are laid out on a machine. Every trick that only a CPU or a GPU needs is behind this door."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dualign import assets
from dualign.config import Config
from dualign.models.compile import compile_layers
from dualign.models.load import load_reference
from dualign.models.master import Masters
from dualign.models.policy import Policy, load_model
from dualign.models.recompute import keep_less
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
    adapters. On a CPU its weights are in a file between their uses."""
    m = config.model
    if m.reference is not None:
        model = load_reference(m, tokenizer).to(policy.device)
        reference = Policy(model, m.precision, config.train.prefix_sharing, "model.reference").freeze()
    elif m.lora is None:
        reference = policy.frozen_copy()
    else:
        return None
    if policy.device.type == "cpu":
        reference.move_to_file(assets.cache_dir())
    return reference


def parallelize(modules: Sequence[Policy], reference: Policy | None, config: Config) -> Masters:
    """Readies `modules` for training: bf16 weights beside fp32 masters. On a CPU masters are kept in halves where the
    optimizer steps on one at a time, and less is kept for backward; on a GPU layers are compiled."""
    exact: dict[Any, Tensor] = {}
    for module in modules:
        exact |= module.round()
    on_cpu = modules[0].device.type == "cpu"
    masters = Masters(list(modules), exact, halved=on_cpu and config.train.optimizer == "adafactor")
    if on_cpu:
        for module in modules:
            keep_less(module.base)
    elif config.train.compile:
        for module in [*modules, *([reference] if reference else [])]:
            compile_layers(module.base)
    return masters
