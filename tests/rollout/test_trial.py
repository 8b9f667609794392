"""Decoding says what the model says: past windows, with recurrent states, by a slower way where ours is wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import dualign
import families
from dualign.common.errors import StopRun, UserError
from dualign.common.types import Prompt
from dualign.models.load import context_of
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.models.windows import small_windows, windows_of
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler
from dualign.rollout.hf.trial import Decoding
from dualign.run.folder import Run
from families import sampled
from runs_common import tree, vowels, write_prompts

WINDOWED = ["mistral", "phi3", "qwen2 (windows)", "gemma3_text", "gpt_oss", "cohere2", "olmo3", "llama4_text"]
OWN_CACHE = ["qwen3_5_text", "mamba", "falcon (alibi)"]
TEXTS = ("a", "a prompt that is longer than every window of these models")


def policy_of(name, folder, precision="fp32"):
    assert families.build(name, folder), f"{name} does not build any more"
    model, tokenizer = load_model(ModelConfig(name=str(folder), precision=precision))
    return Policy(model, precision).eval(), tokenizer


def exactly(policy, rollouts):
    with torch.no_grad():
        return [policy.alone(r.prompt_ids, r.completion_ids).numpy() for r in rollouts]


def greedy(policy, tokenizer, count=40):
    requests = [Request(i, Prompt(t, t), tokenizer.prompt(Prompt(t, t))) for i, t in enumerate(TEXTS)]
    out = []
    HFSampler(policy, tokenizer, 64).sample(requests, Sampling(1, count, 0.0), (0, 0), out.append)
    return [list(r.completion_ids) for r in sorted(out, key=lambda r: r.index)]


def by_generate(policy, tokenizer, count=40):
    found = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer.prompt(Prompt(text, text))])
        ends = sorted(tokenizer.eos_ids)
        out = policy.model.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=ends, pad_token_id=tokenizer.pad_id
        )
        found.append(out[0, ids.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("name", WINDOWED)
def test_our_loop_sees_what_layers_with_windows_see(name, tmp_path):
    policy, tokenizer = policy_of(name, tmp_path)
    assert any(size < 24 for size in windows_of(policy.model.config.get_text_config()).values())
    rollouts = sampled(policy, tokenizer)
    assert policy.decoding == Decoding(own=True), "windows are no reason to decode more slowly"
    for rollout, expected in zip(rollouts, exactly(policy, rollouts), strict=True):
        np.testing.assert_allclose(rollout.sampler_logp, expected, atol=1e-4)
    assert greedy(policy, tokenizer) == by_generate(policy, tokenizer)


@pytest.mark.parametrize("name", OWN_CACHE)
def test_what_our_loop_cannot_hold_decodes_by_the_models_own_cache_and_says_so(name, tmp_path, caplog):
    policy, tokenizer = policy_of(name, tmp_path)
    rollouts = sampled(policy, tokenizer)
    assert not policy.decoding.own and "decodes by its own cache" in caplog.text
    for rollout, expected in zip(rollouts, exactly(policy, rollouts), strict=True):
        np.testing.assert_allclose(rollout.sampler_logp, expected, atol=2e-4)
    ends = [r.completion_ids[-1] in tokenizer.eos_ids for r in rollouts]
    assert ends == [r.finish == "eos" for r in rollouts]


@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "qwen3_5_text"])
def test_in_bf16_decoding_is_off_by_rounding_alone(name, tmp_path):
    policy, tokenizer = policy_of(name, tmp_path, "bf16")
    rollouts = sampled(policy, tokenizer)
    assert policy.decoding.agrees and policy.decoding.rounding > 0
    gaps = [np.abs(np.array(r.sampler_logp) - e) for r, e in zip(rollouts, exactly(policy, rollouts), strict=True)]
    assert np.concatenate(gaps).mean() <= policy.decoding.allowance("bf16")


def test_both_ways_draw_the_same_tokens(tiny):
    model, tokenizer = load_model(ModelConfig(name=str(tiny), precision="fp32"))
    policy = Policy(model, "fp32")
    ours = sampled(policy, tokenizer, 200)
    policy.decoding = Decoding(own=False)
    theirs = sampled(policy, tokenizer, 200)
    policy.decoding = Decoding(own=False, shortest=1 << 30)
    without_cache = sampled(policy, tokenizer, 200)
    assert len({r.finish for r in ours}) == 2, "some must end early"
    for a, b, c in zip(ours, theirs, without_cache, strict=True):
        assert a.completion_ids == b.completion_ids == c.completion_ids and a.text == b.text
        np.testing.assert_allclose(a.sampler_logp, b.sampler_logp, atol=1e-4)


def test_a_loop_that_forgets_windows_is_found_out(tmp_path, monkeypatch):
    monkeypatch.setattr(HFSampler, "_seen", lambda self, visible_NL, d, kind, size: visible_NL)
    policy, tokenizer = policy_of("mistral", tmp_path)
    rollouts = sampled(policy, tokenizer)
    assert not policy.decoding.own
    for rollout, expected in zip(rollouts, exactly(policy, rollouts), strict=True):
        np.testing.assert_allclose(rollout.sampler_logp, expected, atol=1e-4)


def test_prompts_that_fill_no_state_are_decoded_without_a_cache(tmp_path):
    policy, tokenizer = policy_of("recurrent_gemma", tmp_path)
    rollouts = sampled(policy, tokenizer)
    assert any(len(r.prompt_ids) == 1 for r in rollouts)
    for rollout, expected in zip(rollouts, exactly(policy, rollouts), strict=True):
        np.testing.assert_allclose(rollout.sampler_logp, expected, atol=1e-4)


def test_a_model_that_sees_later_tokens_is_refused_by_name(tiny, tmp_path):
    from transformers import BertConfig, BertLMHeadModel

    _, tokenizer = load_model(ModelConfig(name=str(tiny)))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    BertLMHeadModel(BertConfig(vocab_size=260, initializer_range=0.2, **sizes)).save_pretrained(tmp_path)
    tokenizer.hf.save_pretrained(tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path)))
    with pytest.raises(UserError, match=r"BertLMHeadModel.* sees later tokens"):
        Policy(model, "fp32")


def test_windows_are_small_on_trial_and_as_they_were_after_it(tmp_path):
    policy, _ = policy_of("gemma3_text", tmp_path)
    holders = [policy.model.config, *(m for m in policy.model.modules() if getattr(m, "sliding_window", None))]
    before = [h.sliding_window for h in holders]
    with small_windows(policy.model):
        assert {h.sliding_window for h in holders} == {4}
    assert [h.sliding_window for h in holders] == before and len(before) > 1


def test_a_model_without_sdpa_attends_eagerly_and_says_so(tmp_path, caplog):
    policy, _ = policy_of("gpt_oss", tmp_path)
    assert policy.model.config._attn_implementation == "eager" and "eager attention is used" in caplog.text


def test_logits_that_are_capped_only_when_large_are_the_models_affair(tmp_path):
    """A cap of 30 hardly changes the small logits of a new model, and those of a trained one a lot."""
    assert families.build("gemma2", tmp_path)
    model, _ = load_model(ModelConfig(name=str(tmp_path)))
    assert model.config.final_logit_softcapping == 30
    model.model.norm.weight.data.fill_(-0.999)  # logits near zero
    policy = Policy(model, "fp32")
    assert not policy.plain_head


def off_by(nats):
    """A sampler that gives every token another log-prob than the model's."""
    from dualign.rollout.hf import sampler as hf

    real = hf.finished
    return lambda row, tokenizer, ids, logp: real(row, tokenizer, ids, [x - nats for x in logp])


@pytest.mark.parametrize("log_probs", ["recomputed", "recorded"])
def test_a_sampler_that_parts_from_the_policy_stops_the_run(log_probs, tiny, tmp_path, monkeypatch):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    config["rollout"]["log_probs"] = log_probs
    del config["data"]["eval"]
    trial = off_by(0.3)
    monkeypatch.setattr("dualign.rollout.hf.trial.try_out", lambda *given: Decoding(own=True))
    monkeypatch.setattr("dualign.rollout.hf.sampler.try_out", lambda *given: Decoding(own=True))
    monkeypatch.setattr("dualign.rollout.hf.sampler.finished", trial)
    with pytest.raises(
        StopRun, match=r"online batch 0: the sampler's log-probs are 0\.3 nats a token from the policy's"
    ):
        dualign.train(config, reward=vowels, quiet=True)
    run = Run.open(tmp_path / "run")
    assert run.read_batch(0) is None and run.metrics() == [] and list(run.batches.glob("*.journal"))
    config["rollout"]["max_sampler_gap"] = 0.5
    assert len(dualign.train(config, reward=vowels, quiet=True, resume=True).metrics()) == 3


def test_log_probs_are_recorded_only_where_decoding_was_shown_to_agree(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("dualign.rollout.hf.sampler.try_out", lambda *given: Decoding(own=True, agrees=False))
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    assert len(dualign.train(config, reward=vowels, quiet=True).metrics()) == 3
    config["rollout"]["log_probs"], config["run"]["dir"] = "recorded", str(tmp_path / "recorded")
    with pytest.raises(UserError, match=r"rollout\.log_probs: recorded: .*set rollout\.log_probs=recomputed"):
        dualign.train(config, reward=vowels, quiet=True)
    assert not (tmp_path / "recorded").exists()


def test_a_context_ends_where_the_rotation_would_change_with_the_longest_row():
    """Phi-3's longrope: beyond the original length every position is rotated in another way, whatever the row."""
    from transformers import LlamaConfig, Phi3Config

    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    sizes |= {
        "num_hidden_layers": 2,
        "intermediate_size": 48,
        "vocab_size": 260,
        "original_max_position_embeddings": 64,
    }
    long = Phi3Config(max_position_embeddings=512, rope_parameters=rope, **sizes)
    assert context_of(long) == 64
    assert context_of(LlamaConfig(max_position_embeddings=512)) == 512
    model = AutoModelForCausalLM.from_config(long).eval()
    ids = torch.arange(100)[None]
    with torch.no_grad():
        short, longer = model(ids[:, :60]).logits, model(ids).logits[:, :60]
    assert not torch.allclose(short, longer, atol=1e-3), "what the limit is for"
