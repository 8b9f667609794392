"""A checkpoint is a whole causal language model with finite weights, or what it lacks is named."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import dualign
from dualign import rollout
from dualign.common.errors import StopRun, UserError
from dualign.models.finite import first_gradient, first_not_finite
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from runs_common import tree, vowels, write_prompts


def changed(tiny, folder, change):
    """A copy of the tiny model with its tensors changed."""
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return ModelConfig(name=str(folder), precision="fp32")


def test_a_checkpoint_without_a_layers_weight_is_refused_by_its_name(tiny, tmp_path):
    config = changed(tiny, tmp_path / "m", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UserError, match=r"does not hold 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(config)


def test_a_decoder_without_its_head_is_no_causal_language_model(tiny, tmp_path):
    from transformers import LlamaConfig, LlamaModel

    _, tokenizer = load_model(ModelConfig(name=str(tiny)))
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaModel(LlamaConfig(vocab_size=260, pad_token_id=0, **sizes)).save_pretrained(tmp_path)
    tokenizer.hf.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not hold 1 weights of a LlamaForCausalLM, the first lm_head\.weight"):
        load_model(ModelConfig(name=str(tmp_path)))


def test_a_damaged_checkpoint_is_an_error_in_words(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.name: .* cannot be loaded"):
        load_model(ModelConfig(name=str(tmp_path / "m")))


def test_a_weight_that_is_not_finite_is_named_on_loading(tiny, tmp_path):
    config = changed(tiny, tmp_path / "m", lambda t: t["model.layers.1.mlp.up_proj.weight"][3].fill_(float("nan")))
    model, _ = load_model(config)
    with pytest.raises(UserError, match=r"not finite: the weight .*layers\.1\.mlp\.up_proj\.weight is not finite"):
        Policy(model, "fp32")


@pytest.mark.parametrize("what", ["another prefix", "a layer's weights missing"])
def test_an_adapter_that_does_not_fit_its_base_is_refused(what, tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = load_model(ModelConfig(name=str(tiny)))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    wrapped.peft_config["default"].base_model_name_or_path = str(tiny)
    wrapped.save_pretrained(tmp_path / "a")
    assert load_model(ModelConfig(name=str(tmp_path / "a")))
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    if what == "another prefix":
        tensors = {name.replace("base_model.model.", "base_model.model.inner."): t for name, t in tensors.items()}
    else:
        tensors = {name: t for name, t in tensors.items() if ".layers.1." not in name}
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit its base: .*lora_A.* is on one side alone"):
        load_model(ModelConfig(name=str(tmp_path / "a")))


def test_what_first_was_not_finite_is_named_in_a_run(tiny, tmp_path, monkeypatch):
    real = rollout.build

    def breaking(config, policy, *more):
        sampler = real(config, policy, *more)
        module = dict(policy.model.named_modules())["model.layers.1.mlp.act_fn"]
        monkeypatch.setattr(module, "forward", lambda x: x / 0 * 0)
        return sampler

    monkeypatch.setattr(rollout, "build", breaking)
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    del config["data"]["eval"]
    with pytest.raises(StopRun, match=r"log π_t of completion .* the first layer .*model\.layers\.1\.mlp\.act_fn"):
        dualign.train(config, reward=vowels, quiet=True)


def test_the_first_layer_and_the_first_gradient_that_are_not_finite():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert first_not_finite(model, lambda: model(x)) == ""
    assert "the first layer" in first_not_finite(model, lambda: model(x * float("inf"))) and " 0 " in first_not_finite(
        model, lambda: model(x * float("inf"))
    )
    model(x).sum().backward()
    assert first_gradient(model.named_parameters()) == ""
    for p in (model[0].weight, model[1].weight):
        p.grad.fill_(float("nan"))
    assert first_gradient(model.named_parameters()).endswith("that of 1.weight")
    model[2].bias.data.fill_(float("inf"))
    assert first_not_finite(model, lambda: model(x)) == "the weight 2.bias is not finite"
