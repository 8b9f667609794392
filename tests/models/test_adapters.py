"""Adapters that a model is loaded from, and adapters that are trained: what is loaded, trained, sampled and saved agree."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dualign
from command import dualign as command
from conftest import make_model, make_tokenizer, save_tiny
from dualign.common.errors import UserError
from dualign.common.types import Prompt
from dualign.config import build, load
from dualign.eval.outputs import Generation, points
from dualign.models.packing import Tokens
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler
from dualign.run import digests
from dualign.training.engine import Engine
from dualign.training.fits import memory_of
from dualign.training.memory import Place
from runs_common import metrics, reward_file, tree, vowels, write_demonstrations, write_prompts

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IDS = torch.arange(10, 40).view(2, 15)
TARGETS = [["q_proj"], ["lm_head"], ["embed_tokens"], ["v_proj", "embed_tokens", "lm_head"]]


def save_base(folder, tied):
    tokenizer = make_tokenizer()
    model = make_model("llama", len(tokenizer), tokenizer.eos_token_id)
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(0.2 * torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(base, folder, targets, **settings):
    """An adapter of `base` whose every weight is random, saved as peft saves it, and the logits of the two together."""
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.3 * torch.randn_like(p))
        logits = model(IDS).logits
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return logits


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapters_folder_is_base_and_adapter_also_once_saved_whole(tied, targets, tmp_path):
    base = save_base(tmp_path / "base", tied)
    expected = save_adapter(base, tmp_path / "adapter", targets)
    model, _ = load_model(ModelConfig(name=str(tmp_path / "adapter")))
    assert torch.allclose(logits_of(model), expected, atol=1e-4)
    assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "peft_config")
    assert not torch.allclose(logits_of(load_model(ModelConfig(name=str(base)))[0]), expected, atol=0.1)
    model.save_pretrained(tmp_path / "whole", state_dict=model.state_dict())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.allclose(logits_of(again), expected, atol=1e-4)
    assert again.config.tie_word_embeddings == (tied and targets == ["q_proj"])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_modules_that_an_adapter_replaces_whole_are_the_models(tied, module, tmp_path):
    base = save_base(tmp_path / "base", tied)
    expected = save_adapter(base, tmp_path / "adapter", ["q_proj"], modules_to_save=[module])
    model, _ = load_model(ModelConfig(name=str(tmp_path / "adapter")))
    assert torch.allclose(logits_of(model), expected, atol=1e-4)
    model.save_pretrained(tmp_path / "whole")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype=torch.float32)
    assert torch.allclose(logits_of(again), expected, atol=1e-4)


def test_a_base_is_found_from_any_folder_or_missed_by_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_base(tmp_path / "m", True)
    expected = save_adapter("m", tmp_path / "runs/one/adapter", ["q_proj"])  # peft writes the path as it is given
    monkeypatch.chdir("/")
    model, _ = load_model(ModelConfig(name=str(tmp_path / "runs/one/adapter")))
    assert torch.allclose(logits_of(model), expected, atol=1e-4)
    found = digests.of_model(str(tmp_path / "runs/one/adapter"))
    assert {"adapter_model.safetensors", "base/model.safetensors"} <= set(found)
    (tmp_path / "m").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"adapter: its base m cannot be loaded"):
        load_model(ModelConfig(name=str(tmp_path / "runs/one/adapter")))
    for base, said in ((str(tmp_path / "m"), "is an adapter of .*/m, which is not there"), (None, "is missing")):
        file = tmp_path / "runs/one/adapter/adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
        with pytest.raises(UserError, match=said):
            load_model(ModelConfig(name=str(file.parent)))


def test_an_adapter_of_another_shape_is_refused_by_name(tmp_path):
    save_adapter(save_base(tmp_path / "one", True), tmp_path / "adapter", ["q_proj"])
    file = tmp_path / "adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 5}))
    with pytest.raises(UserError, match=r"model\.name: the adapter .* does not fit its base"):
        load_model(ModelConfig(name=str(file.parent)))


def engine_of(model, tmp_path, targets, precision, **more):
    config = tree(model, write_demonstrations(tmp_path), tmp_path / "run", {"name": "sft"}, lr=3e-2, optimizer="adamw")
    config["model"] |= {"precision": precision, "lora": {"r": 4, "target_modules": targets}} | more
    return Engine.load(build(config))


def trained(engine):
    """A few steps on fixed rows; the rows."""
    from test_engine import demonstrations

    tokens, batch = demonstrations()
    for step in range(4):
        engine.begin_update(step, 0)
        engine.update(engine.config.algo, tokens, batch)
    return tokens


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_of_any_layer_are_trained_sampled_and_saved(precision, tied, targets, tmp_path, monkeypatch):
    base = save_base(tmp_path / "base", tied)
    engine = engine_of(base, tmp_path, targets, precision)
    from test_engine import demonstrations

    before = engine.score(engine.policy, demonstrations()[0])
    tokens = trained(engine)
    for name, p in engine.masters.named.items():
        if "lora_B" in name or "lora_embedding_A" in name:  # those begin at zero
            assert float(p.abs().max()) > 1e-3, name
    after = engine.score(engine.policy, tokens)
    assert float((after - before).sum()) > 1.0
    near = 1e-4 if precision == "fp32" else 0.15
    with engine.policy.model.disable_adapter():
        assert torch.allclose(engine.score(engine.policy, tokens), before, atol=near)
    # sampled from the very same policy
    said = []
    asked = [Request(i, Prompt(str(i), "p"), tokens.prompt_ids[i]) for i in range(4)]
    HFSampler(engine.policy, engine.tokenizer, 64).sample(asked, Sampling(2, 8, 1.0), (0, 0), said.append)
    drawn = Tokens(
        *zip(*[(r.prompt_ids, r.completion_ids, r.group) for r in sorted(said, key=lambda r: r.index)], strict=True)
    )
    recorded = torch.zeros(len(drawn), drawn.width)
    for i, r in enumerate(sorted(said, key=lambda r: r.index)):
        recorded[i, : len(r.sampler_logp)] = torch.tensor(r.sampler_logp)
    assert torch.allclose(engine.score(engine.policy, drawn), recorded, atol=near)
    # and what is saved is it, from any folder, for transformers and for us
    engine.save(tmp_path / "saved", {"step": 4, "update": 0, "labels": 0, "losses": []})
    monkeypatch.chdir("/")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    for model in (opened, load_model(ModelConfig(name=str(tmp_path / "saved"), precision=precision))[0]):
        policy = Policy(model, precision).eval()
        with torch.no_grad():
            found = policy(policy.pack(tokens, range(len(tokens)), 0))
        assert torch.allclose(found, after, atol=near)


@pytest.mark.parametrize("value_model", ["adapters", "whole"])
def test_a_value_model_has_adapters_of_its_own_over_the_policys_weights(value_model, tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "ppo"}, lr=1e-2, online_batches=2)
    config["model"] |= {"precision": "bf16", "lora": {"r": 4, "value_model": value_model}}
    engine = Engine.load(build(config))
    mine = {p.data_ptr() for p in engine.critic.parameters() if not p.requires_grad}
    assert mine <= {p.data_ptr() for p in engine.policy.parameters()} and bool(mine) == (value_model == "adapters")
    run = dualign.train(build(config), reward=vowels, quiet=True)
    assert all(record["value_loss"] > 0 for record in run.metrics())
    stored = load_file(run.resumable() / "train.safetensors")
    moved = {name: value for name, value in stored.items() if "lora_B" in name and bool(value.any())}
    assert {name[:2] for name in moved} == {"0.", "1."}
    others = {name for name in stored if name.startswith("1.") and "lora_" not in name}
    assert (others == {"1.value.weight", "1.value.bias"}) == (value_model == "adapters")
    # a run of before the key was there goes on as it began
    text = run.config_file.read_text()
    assert f"value_model: {value_model}" in text
    run.config_file.write_text(text.replace(f"value_model: {value_model}", ""))
    assert load(run.config_file).model.lora.value_model == "whole"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_on_an_adapter_are_of_a_base_that_the_run_keeps(precision, tmp_path, monkeypatch):
    """π_0 by LoRA, then LoRA: π_0 is the first adapter's model, and checkpoints open as what was trained."""
    base = save_base(tmp_path / "m", True)
    save_adapter(base, tmp_path / "pi0", ["v_proj", "lm_head"])
    config = tree(tmp_path / "pi0", write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, lr=1e-2)
    config["model"] |= {"precision": precision, "lora": {"r": 4}}
    run = dualign.train(config, reward=vowels, quiet=True)
    near = 1e-3 if precision == "fp32" else 1.5

    def gap(model, step, column):
        b = run.read_batch(step)
        policy = Policy(model, precision).eval()
        with torch.no_grad():
            found = policy(policy.pack(b.tokens, range(len(b.tokens)), 0))
        return float((found - getattr(b.batch, column)).sum(-1).abs().max())

    first, _ = load_model(ModelConfig(name=str(tmp_path / "pi0")))
    assert (
        gap(first, 0, "logp_ref_NT") < near
        and gap(first, 0, "logp_old_NT") < near
        and gap(first, 2, "logp_ref_NT") < near
    )
    assert gap(load_model(ModelConfig(name=str(base)))[0], 0, "logp_ref_NT") > 5
    monkeypatch.chdir("/")
    last = run.saved()[-1]
    assert json.loads((last / "adapter_config.json").read_text())["base_model_name_or_path"] == str(run.base)
    opened = AutoModelForCausalLM.from_pretrained(last, dtype=torch.float32)
    ours, _ = load_model(ModelConfig(name=str(last)))
    assert torch.allclose(logits_of(opened), logits_of(ours), atol=1e-3)
    kept = AutoModelForCausalLM.from_pretrained(run.base, dtype=torch.float32)
    assert torch.allclose(logits_of(kept), logits_of(first), atol=1e-3 if precision == "fp32" else 0.3)
    assert max(record["sampler_gap"] for record in metrics(run.folder)) < near
    assert command("verify", run.folder).code == 0
    longer = {**config, "train": {**config["train"], "online_batches": 4}}
    dualign.train(longer, reward=vowels, resume=True, quiet=True)
    moved = shutil.move(run.folder, tmp_path / "moved")
    ours, _ = load_model(ModelConfig(name=str(os.path.join(moved, "checkpoints", last.name))))
    assert torch.allclose(logits_of(opened), logits_of(ours), atol=1e-3)


def test_a_layer_that_is_not_there_is_refused_by_name(tiny, tmp_path):
    with pytest.raises(UserError, match=r"model\.lora\.target_modules: .*no_such"):
        engine_of(tiny, tmp_path, ["no_such"], "fp32")


# --- model.reference ---


@pytest.mark.parametrize("lora", [None, {"r": 4}])
@pytest.mark.parametrize("adapter", [False, True])
def test_pi_0_may_be_another_model_than_the_one_that_training_starts_from(lora, adapter, tiny, tmp_path):
    start = save_base(tmp_path / "start", False)
    reference = tmp_path / "adapter" if adapter else tiny
    if adapter:
        save_adapter(tiny, reference, ["q_proj", "lm_head"])
    config = tree(start, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, lr=1e-2)
    config["model"] |= {"reference": str(reference), "lora": lora}
    run = dualign.train(config, reward=vowels, quiet=True)
    b = run.read_batch(0)
    for name, column in ((reference, "logp_ref_NT"), (start, "logp_old_NT")):
        policy = Policy(load_model(ModelConfig(name=str(name)))[0], "fp32").eval()
        with torch.no_grad():
            found = policy(policy.pack(b.tokens, range(len(b.tokens)), 0))
        assert torch.allclose(found, getattr(b.batch, column), atol=1e-3)
    before = json.loads((run.folder / "summary.json").read_text())["before"]
    assert before["kl"] > 1.0  # of where training starts, from π_0


def test_pi_0_of_other_tokens_is_refused_by_name(tiny, tmp_path):
    other = save_tiny(tmp_path / "other", "llama")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(other)
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    config["model"]["reference"] = str(other)
    with pytest.raises(UserError, match=r"model\.reference: .* has other tokens than .*<new>"):
        Engine.load(build(config))
    config["model"]["reference"] = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no such folder"):
        Engine.load(build(config))


def test_a_plan_and_an_evaluation_know_the_pi_0_that_is_named(tiny, tiny_gpt2, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    config["model"]["reference"] = str(tiny_gpt2)
    config["data"]["eval"] = None
    (tmp_path / "recipe.json").write_text(json.dumps(config | {"reward": [reward_file()]}))
    said = command("train", tmp_path / "recipe.json", "--dry-run")
    assert said.code == 0 and "π_0" in said.out
    plain = memory_of(build(config), Place(device="cpu"))[0]
    reference = AutoModelForCausalLM.from_pretrained(tiny_gpt2)
    assert plain.phases()["score"]["π_0"] == 4 * reference.num_parameters()
    config["model"] |= {"reference": None, "lora": {}}
    assert "π_0" not in memory_of(build(config), Place(device="cpu"))[0].phases()["score"]

    save_adapter(tiny, tmp_path / "sft", ["q_proj", "lm_head"])
    config["model"] |= {"reference": str(tmp_path / "sft"), "lora": None}
    run = dualign.train(config, reward=vowels, quiet=True)
    how = Generation([Prompt("a", "say this:")], 8, 0.0, 1, 0, tmp_path / "outputs")
    found = points(str(run.folder), how)
    assert [(p.name, p.batches) for p in found] == [("π_0", 0), ("the start", 0), ("batch 3", 3)]
    texts = {p.name: next(iter(p)).text for p in found}
    named = points(str(tmp_path / "sft"), how) + points(str(tiny), how)
    assert [texts["π_0"], texts["the start"]] == [next(iter(p)).text for p in named] and texts["π_0"] != texts[
        "the start"
    ]


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["v_proj", "embed_tokens"]])
def test_a_sampler_with_weights_of_its_own_gets_adapters_merged(targets, tmp_path):
    engine = engine_of(save_base(tmp_path / "m", False), tmp_path, targets, "fp32")
    trained(engine)
    before = {name: p.clone() for name, p in engine.policy.model.named_parameters()}
    given = dict(engine.weights())
    assert all(torch.equal(p, before[name]) for name, p in engine.policy.model.named_parameters())  # nothing was merged
    merged = engine.policy.model.merge_and_unload().state_dict()
    assert given.keys() == merged.keys()
    assert all(torch.allclose(given[name], merged[name], atol=1e-6) for name in merged)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "m").state_dict()
    assert any(not torch.equal(given[name], plain[name]) for name in plain)
