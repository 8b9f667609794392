"""A spelled-out step of decoding says what the model says, and is used for no model that is put together differently."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OlmoConfig,
    Qwen2Config,
    SmolLM3Config,
)

from conftest import make_tokenizer
from dualign.common.types import Prompt
from dualign.models.policy import Policy, Tokenizer, load_model
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf import sampler as hf
from dualign.rollout.hf.cpu_linear import supported
from dualign.rollout.hf.sampler import HFSampler

pytestmark = pytest.mark.skipif(
    not supported(torch.zeros(1, dtype=torch.bfloat16)), reason="this processor lays out no bf16 weights"
)
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip


def policy_of(kind, **settings):
    torch.manual_seed(0)
    common = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "pad_token_id": 0}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 2, "eos_token_id": 1}
    model = AutoModelForCausalLM.from_config(kind(**{**common, **heads, **settings}))
    with torch.no_grad():
        for p in model.parameters():  # of an untrained model biases are zeros, norms ones, and logits all alike
            p.copy_(p + 0.1 * torch.randn_like(p) if p.dim() == 1 else 3 * p)
    return Policy(model, "bf16").frozen_copy()


def sampled(policy, tokenizer):
    """Rollouts, and whether the step was found to agree (None: not even tried)."""
    requests = [Request(i, Prompt(str(i), "x"), tuple(range(3 + i, 10 + 3 * i))) for i in range(5)]
    sampler, out = HFSampler(policy, tokenizer, 64), []
    for seed in range(2):
        sampler.sample(requests, Sampling(4, 40, 1.0), (0, seed), out.append)
    assert len({len(r.completion_ids) for r in out}) > 2, "rows must have been dropped midway"
    return [(r.completion_ids, r.sampler_logp) for r in out], sampler.agrees


def draw(sampler):
    """Four completions of one prompt."""
    out = []
    sampler.sample([Request(0, Prompt("0", "x"), (5, 6, 7))], Sampling(4, 20, 1.0), (0, 0), out.append)
    return [(r.completion_ids, r.sampler_logp) for r in sorted(out, key=lambda r: r.index)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(make_tokenizer(), [1, *range(20, 30)])


def near(found, expected):
    """A draw at the edge of two tokens may fall to the other, after which the rest of that completion differs."""
    same = [(a, b) for (ids, a), (other, b) in zip(found, expected, strict=True) if ids == other]
    assert len(same) >= 0.8 * len(found)
    for a, b in same:
        torch.testing.assert_close(torch.tensor(a), torch.tensor(b), atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (LlamaConfig, {}),
        (LlamaConfig, {"head_dim": 32, "num_key_value_heads": 4}),
        (LlamaConfig, {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
        (LlamaConfig, {"rope_scaling": LLAMA3, "hidden_act": "gelu", "rms_norm_eps": 0.1}),
        (Qwen2Config, {}),
        (MistralConfig, {"sliding_window": None}),
        (MistralConfig, {"sliding_window": 8}),
    ],
)
def test_the_step_says_what_the_model_says(kind, settings, tokenizer, monkeypatch):
    policy = policy_of(kind, **settings)
    found, agrees = sampled(policy, tokenizer)
    assert agrees
    monkeypatch.setattr(hf, "like_llama", lambda base: False)
    expected, agrees = sampled(policy, tokenizer)
    assert agrees is None
    near(found, expected)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (GraniteConfig, {"residual_multiplier": 0.5}),
        (GraniteConfig, {"embedding_multiplier": 12.0}),
        (SmolLM3Config, {"no_rope_layers": [1, 1, 1, 0]}),
        (OlmoConfig, {}),  # norms without weights
    ],
)
def test_a_model_put_together_differently_decodes_by_itself(kind, settings, tokenizer, monkeypatch):
    policy = policy_of(kind, **settings)
    found, agrees = sampled(policy, tokenizer)
    assert agrees is False
    monkeypatch.setattr(hf, "like_llama", lambda base: False)
    assert found == sampled(policy, tokenizer)[0]


def test_one_layer_of_many_is_enough_to_tell(tokenizer, monkeypatch):
    policy = policy_of(LlamaConfig, num_hidden_layers=24)
    assert sampled(policy, tokenizer)[1]
    attention = policy.base.layers[17].self_attn
    plain = attention.forward

    def unrotated(*args, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        return plain(*args, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **kwargs)

    monkeypatch.setattr(attention, "forward", unrotated)
    assert sampled(policy, tokenizer)[1] is False


def test_weights_are_those_of_now(tokenizer):
    policy = policy_of(LlamaConfig)
    sampler = HFSampler(policy, tokenizer, 64)
    before = draw(sampler)
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(1.5)
    policy.weights_changed()
    assert draw(sampler) == draw(HFSampler(policy, tokenizer, 64)) != before
    assert sampler.agrees


def test_adapters_decode_by_themselves(tiny, tokenizer):
    peft = pytest.importorskip("peft")
    model, _ = load_model(ModelConfig(name=str(tiny)))
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    policy = Policy(model, "bf16")
    policy.round()
    sampler = HFSampler(policy, tokenizer, 8)
    assert len(draw(sampler)) == 4 and sampler.agrees is None


def test_fp32_decodes_by_the_model(tiny, tokenizer):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    sampler = HFSampler(Policy(model, "fp32"), tokenizer, 8)
    assert len(draw(sampler)) == 4 and sampler.agrees is None
