"""How models are laid out on a machine. Every trick that only a CPU, a GPU or several need is behind this door."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dualign import assets
from dualign.common.processes import Processes
from dualign.config import Config
from dualign.models.compile import compile_layers
from dualign.models.critic import Critic
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
        # transformers 5 renames it on the way
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    model.to(device)
    return Policy(model, config.model.precision, config.train.prefix_sharing), tokenizer


class Layout:
    """Where the models of a run are.

    Whole: bf16 weights beside fp32 masters, in halves where the optimizer opens those that it steps on; π_0 rests in a
    file (CPU) or in the host's memory (GPU). Divided (train.shard): each is, before the next one is made, and the policy
    is whole again only while one samples from it. On a CPU less is kept for backward; on a GPU layers are compiled."""

    def __init__(self, config: Config, processes: Processes, device: torch.device) -> None:
        self.config, self.on_cpu, self.mesh = config, device.type == "cpu", None
        self.aside: torch.device | None = None  # where copies are that come to the device layer by layer, divided
        if config.train.shard != "none":
            self.mesh = mesh_of(config.train.shard, processes, device)
            self.aside = None if self.on_cpu else torch.device("cpu")

    def reference(self, policy: Policy, tokenizer: Tokenizer) -> Policy | None:
        """π_0: the model that model.reference names, or `policy` as it is loaded. None where that is the policy without
        its adapters."""
        m, share = self.config.model, self.config.train.prefix_sharing
        if m.reference is not None:
            model = load_reference(m, tokenizer).to(policy.device)
            reference = Policy(model, m.precision, share, "model.reference").freeze()
        elif m.lora is None:
            reference = policy.frozen_copy(self.aside)
        else:
            return None
        if not self.on_cpu:
            self._lighten(reference)
        if self.mesh is not None:
            divide(reference, self.mesh)
        elif self.on_cpu:
            reference.move_to_file(assets.cache_dir())
        else:
            reference.move_to_host()
        return reference

    def value_model(self, policy: Policy) -> Critic:
        """PPO's, which begins as the policy."""
        lora = self.config.model.lora
        whole = lora is None or lora.value_model == "whole"
        critic = Critic(policy, whole, shared=self.mesh is None, where=self.aside)
        if self.mesh is None:
            critic.to(policy.device)
        else:
            self._lighten(critic)
            divide(critic, self.mesh)
        return critic

    def ready(self, policy: Policy, critic: Critic | None) -> tuple[Policy, Masters]:
        """The policy to train, and its and the value model's masters."""
        exact: dict[Any, Tensor] = {}
        if self.mesh is not None:
            self._lighten(policy)
            whole, policy = policy, apart(policy)
            divide(policy, self.mesh)
            gathers(whole, policy)
        else:
            for module in filter(None, (policy, critic)):
                exact |= module.round()
                self._lighten(module)
        modules: list[torch.nn.Module] = [policy, *([critic] if critic else [])]
        return policy, Masters(modules, exact, halved=self.config.train.optimizer == "adafactor")

    def _lighten(self, module: Policy) -> None:
        if self.on_cpu:
            keep_less(module.base)
        elif self.config.train.compile:
            compile_layers(module.base)
