"""Adapters on a base of 4 bits: π_0 is that base, adapters alone are trained and saved, a resume is to the bit."""

import pytest
import torch

import dualign
from dualign.common.errors import UserError
from dualign.config import build
from dualign.models.load import quantized
from dualign.run.folder import Run
from dualign.training.engine import Engine
from runs_common import metrics, tree, vowels, weights, write_prompts

pytest.importorskip("bitsandbytes")
PPO = {"algo": {"name": "ppo"}}


def config_of(tiny, folder, run, precision="bf16", **train):
    config = tree(tiny, write_prompts(folder), folder / run, {"name": "dar"}, **train)
    config["model"] |= {"precision": precision, "lora": {"r": 4, "quantize": "nf4"}}
    return config


def base_of(tiny):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32, **quantized()).eval()


def test_pi_0_is_the_quantized_base_and_only_adapters_are_saved(tiny, tmp_path):
    run = dualign.train(config_of(tiny, tmp_path, "run", "fp32"), reward=vowels, quiet=True)
    b, base = Run.open(run.folder).batch(0), base_of(tiny)
    assert any("4bit" in type(m).__name__ for m in base.modules())
    for prompt, completion, found in zip(
        b.tokens.prompt_ids, b.tokens.completion_ids, b.batch.logp_ref_NT, strict=True
    ):
        ids = torch.tensor([prompt + completion])
        with torch.no_grad():
            logp = base(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(found[: len(completion)], expected, atol=1e-3)
    assert all("lora_" in name for name in weights(run.folder))
    assert metrics(run.folder)[-1]["grad_norm"] > 0


def test_a_resume_is_to_the_bit(tiny, tmp_path):
    whole = dualign.train(config_of(tiny, tmp_path, "whole"), reward=vowels, quiet=True)
    part = config_of(tiny, tmp_path, "part", online_batches=2)
    dualign.train(part, reward=vowels, quiet=True)
    part["train"]["online_batches"] = 3
    resumed = dualign.train(part, reward=vowels, quiet=True, resume=True)
    one, other = weights(resumed.folder), weights(whole.folder)
    assert all(torch.equal(one[key], other[key]) for key in other)


def test_weights_for_a_sampler_are_what_the_policy_computes_with(tiny, tmp_path):
    engine = Engine.load(build(config_of(tiny, tmp_path, "run")))
    found, base = dict(engine.weights()), base_of(tiny)
    from bitsandbytes.functional import dequantize_4bit

    weight = base.model.layers[1].mlp.up_proj.weight
    expected = dequantize_4bit(weight.data, weight.quant_state)
    assert torch.allclose(found["model.layers.1.mlp.up_proj.weight"].float(), expected.float(), atol=1e-2)
    assert set(found) >= {name for name, _ in base.named_parameters()}


def test_shares_and_value_models_are_refused(tiny, tmp_path):
    for config in (config_of(tiny, tmp_path, "run", shard="full"), config_of(tiny, tmp_path, "run") | PPO):
        with pytest.raises(UserError, match="4 bits cannot be divided"):
            build(config)
