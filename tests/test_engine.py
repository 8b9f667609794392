"""What the engine keeps beside the weights follows them, whichever optimizer steps."""

import pytest
import torch
from transformers import BloomConfig, Gemma3Config, Gemma3TextConfig, GPT2Config, OPTConfig, OPTForCausalLM

from conftest import make_tokenizer
from dualign.common.types import Label, Prompt, Rollout
from dualign.config import build
from dualign.models.load import context_of
from dualign.models.packing import pack
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.run.batch import Row, labelled
from dualign.training.engine import Engine
from runs_common import tree, write_demonstrations, write_prompts


def demonstrations():
    rollouts = [
        Rollout(i, i, Prompt(str(i), "p"), (5, 6, 7 + i), tuple(range(20 + i, 26 + 2 * i)), "x", "eos", ())
        for i in range(4)
    ]
    b = labelled(0, [Row(rollout, Label(1.0)) for rollout in rollouts])
    return b.tokens, b.batch


@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_after_a_step_log_probs_are_those_of_the_weights_that_are_saved(optimizer, tiny, tmp_path):
    config = tree(tiny, write_demonstrations(tmp_path), tmp_path / "run", {"name": "sft"}, optimizer=optimizer, lr=1e-2)
    config["model"]["precision"] = "bf16"
    config = build(config)
    engine = Engine.load(config)
    tokens, batch = demonstrations()
    before = engine.score(engine.policy, tokens)
    engine.begin_update(0, 0)
    engine.update(config.algo, tokens, batch)
    after = engine.score(engine.policy, tokens)
    assert not torch.allclose(before, after, atol=0.05)
    weight = engine.policy.head.weight
    assert torch.equal(engine.policy.rounded_head(), weight.detach().to(torch.bfloat16))

    plain, _ = load_model(ModelConfig(name=str(tiny)))
    with engine.masters.whole():
        trained = {name.removeprefix("0.model."): p for name, p in engine.masters.named.items()}
        plain.load_state_dict(trained, strict=False)
    fresh = Policy(plain, "bf16", True)
    with torch.no_grad():
        again = fresh(pack(tokens, range(len(tokens)), tokens.width, 0, share=True))
    assert torch.allclose(after, again, atol=0.02)


def test_a_critic_reads_what_the_decoder_says_whatever_its_width(tmp_path):
    """OPT's smaller ones project their layers' width to the embedding's."""
    tokenizer = make_tokenizer()
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 16,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    eos = dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **eos)).save_pretrained(
        tmp_path
    )
    tokenizer.save_pretrained(tmp_path)
    for precision in ("fp32", "bf16"):
        config = tree(tmp_path, write_prompts(tmp_path), tmp_path / "run", {"name": "ppo"})
        config["model"]["precision"] = precision
        engine = Engine.load(build(config))
        tokens, _ = demonstrations()
        assert engine.critic.value.in_features == 16 and torch.equal(
            engine.score(engine.critic, tokens).sum(), torch.tensor(0.0)
        )


def test_a_context_is_that_of_the_part_that_reads_text():
    text = {"max_position_embeddings": 64, "num_hidden_layers": 1}
    assert context_of(Gemma3Config(text_config=text)) == context_of(Gemma3TextConfig(**text)) == 64
    assert context_of(GPT2Config(n_positions=48)) == 48 and context_of(BloomConfig()) > 10**6
