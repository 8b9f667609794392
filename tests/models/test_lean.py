"""Layers that keep less for backward give the same log-probs, to the bit, and the same gradients."""

import pytest
import torch

from dualign.models.packing import Tokens
from dualign.models.policy import Policy, load_model
from dualign.models.recompute import LeanFeedForward, LeanNorm, keep_less
from dualign.models.settings import ModelConfig

TOKENS = Tokens(((5, 6, 7), (5, 6, 7), (9,)), ((1, 2, 3, 4), (8,), (3, 3, 3)), (0, 0, 1))


def passes(policy):
    """Log-probs, gradients, and the bytes that are kept between forward and backward."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in policy.parameters()}

    def note(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    policy.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        logp = policy(policy.pack(TOKENS, [0, 1, 2], 0))
    (logp * torch.tensor([[1.0], [-2.0], [0.5]])).sum().backward()
    return logp.detach(), [p.grad.clone() for p in policy.parameters()], sum(kept.values())


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_lean_layers_are_the_plain_ones(tiny, precision, tolerance):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, precision)
    policy.round()
    logp, grads, kept = passes(policy)
    keep_less(policy.base)
    kinds = [type(m) for m in policy.base.modules()]
    assert sum(issubclass(k, LeanNorm) for k in kinds) == 5 and sum(issubclass(k, LeanFeedForward) for k in kinds) == 2
    lean_logp, lean_grads, lean_kept = passes(policy)
    assert torch.equal(logp, lean_logp) and lean_kept < 0.9 * kept
    for a, b in zip(lean_grads, grads, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


def test_other_layers_are_left_as_they_are(tiny, tiny_gpt2):
    gpt2, _ = load_model(ModelConfig(name=str(tiny_gpt2)))
    keep_less(gpt2)
    model, _ = load_model(ModelConfig(name=str(tiny)))
    model.model.layers[0].mlp.act_fn = torch.nn.GELU()
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(32, 48, bias=True)
    capped, norm = model.model.norm, type(model.model.norm)
    capped.__class__ = type("Capped", (norm,), {"forward": lambda self, x: norm.forward(self, x.clamp(max=100))})
    gated = model.model.layers[0].input_layernorm
    gated.__class__ = type("Gated", (norm,), {"forward": lambda self, x, gate: x * gate})
    keep_less(model)
    assert not isinstance(capped, LeanNorm) and not isinstance(gated, LeanNorm)
    for m in [*gpt2.modules(), *model.modules()]:
        assert not isinstance(m, LeanFeedForward)
