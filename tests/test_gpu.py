"""What is special on a CUDA device gives what the plain way gives. Skipped where there is none."""

import copy

import numpy as np
import pytest
import torch

import dualign
from dualign.common.types import Prompt
from dualign.config import build
from dualign.models.compile import can_compile, compile_layers
from dualign.models.logprobs import token_logp
from dualign.models.packing import Tokens, pack
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling
from dualign.rollout.hf.sampler import HFSampler
from dualign.training.engine import Engine
from runs_common import tree, vowels, write_prompts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXTS = ["hi", "a much longer prompt than the others, to be padded", "what now?", "x"] * 4


def setup(folder, precision, attention="sdpa"):
    model, tokenizer = load_model(ModelConfig(name=str(folder), attention=attention))
    prompts = [Prompt(str(i), ({"role": "user", "content": t},)) for i, t in enumerate(TEXTS)]
    requests = [Request(i, p, tokenizer.prompt(p)) for i, p in enumerate(prompts)]
    return Policy(model.cuda(), precision), tokenizer, requests


def draw(policy, tokenizer, requests, sampling, graphs=True, rows=256):
    out = []
    sampler = HFSampler(policy, tokenizer, rows, graphs)
    sampler.sample(requests, sampling, (0, 0), out.append)
    assert sampler.graphs.enabled == (graphs and sampler.sdpa), "recording failed"
    return sorted(out, key=lambda r: r.index)


def logp_of(policy, r):
    """What the model says of a rollout's tokens, all at once."""
    with torch.no_grad():
        logits = policy.model(torch.tensor([r.prompt_ids + r.completion_ids]).cuda()).logits[0]
    logp, start = torch.log_softmax(logits.double(), -1), len(r.prompt_ids)
    return [logp[start + t - 1, c].item() for t, c in enumerate(r.completion_ids)]


@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
def test_greedy_equals_generate(kind, request):
    policy, tokenizer, requests = setup(request.getfixturevalue(kind), "fp32")
    ours = draw(policy, tokenizer, requests, Sampling(1, 150, 0.0))
    for r, rollout in zip(requests, ours, strict=True):
        theirs = policy.model.generate(
            torch.tensor([r.prompt_ids]).cuda(), max_new_tokens=150, do_sample=False, pad_token_id=tokenizer.pad_id
        )[0, len(r.prompt_ids) :].tolist()
        assert list(rollout.completion_ids) == theirs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
def test_graphs_change_nothing(kind, attention, request):
    policy, tokenizer, requests = setup(request.getfixturevalue(kind), "fp32", attention)
    sampling = Sampling(16, 150, 0.9, 0.95)
    replayed, plain = (draw(policy, tokenizer, requests, sampling, graphs) for graphs in (True, False))
    assert [r.completion_ids for r in replayed] == [r.completion_ids for r in plain]
    assert {r.finish for r in replayed} >= {"eos"}
    for r in replayed[::7]:
        np.testing.assert_allclose(r.sampler_logp, logp_of(policy, r), atol=2e-4)


def test_compiled_layers_draw_what_plain_ones_draw(tiny):
    policy, tokenizer, requests = setup(tiny, "fp32")
    compiled = copy.deepcopy(policy)
    compile_layers(compiled.base)
    assert can_compile() and type(compiled.base.layers[0]) is not type(policy.base.layers[0])
    ours, plain = (draw(each, tokenizer, requests, Sampling(1, 90, 0.0)) for each in (compiled, policy))
    assert [r.completion_ids for r in ours] == [r.completion_ids for r in plain]
    for temperature in (1.0, 0.7):
        for r in draw(compiled, tokenizer, requests, Sampling(8, 90, temperature))[::5]:
            np.testing.assert_allclose(r.sampler_logp, logp_of(policy, r), atol=2e-4)


def test_compiled_layers_say_what_plain_ones_say(tiny):
    policy, tokenizer, requests = setup(tiny, "fp32")
    assert policy.share
    compiled = copy.deepcopy(policy)
    compile_layers(compiled.base)
    for size in (4, 8, 12):  # other shapes, one compilation
        prompts = tuple(requests[i // 4].prompt_ids for i in range(size))
        completions = tuple(tuple((7 * i + 5 * j) % 250 for j in range(5 + 3 * i)) for i in range(size))
        tokens = Tokens(prompts, completions, tuple(i // 4 for i in range(size)))
        micro = pack(tokens, list(range(size)), tokens.width, tokenizer.pad_id, True).to(policy.device)
        logps = []
        for each in (policy, compiled):
            each.zero_grad()
            logps.append(each(micro))
            logps[-1].sum().backward()
        torch.testing.assert_close(logps[1], logps[0], atol=1e-4, rtol=1e-4)
        for a, b in zip(compiled.parameters(), policy.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-3)
    assert can_compile(), "this machine could not compile"


def test_flash_attention_says_what_sdpa_says(tiny):
    policy, tokenizer, requests = setup(tiny, "bf16")
    assert policy.flash
    size, weight = 12, torch.randn(12, 1).cuda()
    prompts = tuple(requests[i // 4].prompt_ids for i in range(size))
    completions = tuple(tuple((7 * i + 5 * j) % 250 for j in range(5 + 3 * i)) for i in range(size))
    tokens, found = Tokens(prompts, completions, tuple(i // 4 for i in range(size))), []
    for flash, compiled in ((False, False), (True, False), (True, True)):
        policy.flash = flash
        if compiled:
            compile_layers(policy.base)
        policy.zero_grad()
        logp = policy(policy.pack(tokens, list(range(size)), tokenizer.pad_id))
        (logp * weight).sum().backward()
        found.append((logp.detach(), [p.grad.clone() for p in policy.parameters()]))
    (blocks, block_grads), *others = found
    for flat, flat_grads in others:
        torch.testing.assert_close(flat, blocks, atol=0.05, rtol=0.02)
        for a, b in zip(flat_grads, block_grads, strict=True):
            assert (a - b).norm() < 0.03 * b.norm()


def test_a_model_with_dropout_in_its_attention_is_trained_without_flash(tiny_gpt2):
    model, tokenizer = load_model(ModelConfig(name=str(tiny_gpt2)))
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.1
    policy = Policy(model.cuda(), "bf16").train()
    assert policy.share and not policy.flash
    tokens = Tokens(((5, 6), (5, 6)), ((1, 2, 3), (4,)), (0, 0))
    policy(policy.pack(tokens, [0, 1], tokenizer.pad_id)).sum().backward()


def test_logprobs_and_their_gradient(monkeypatch):
    monkeypatch.setattr("dualign.models.logprobs.GPU_CHUNK", 300 * 1000 * 2)  # several chunks, the last one smaller
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 64).cuda(), torch.randn(1000, 64).cuda() / 4
    target, upstream = torch.randint(1000, (700,)).cuda(), torch.randn(700).cuda()
    for dtype, atol in ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)):
        h, w = hidden.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
        logp = token_logp(h, w, w.detach().to(dtype), target)
        logp.backward(upstream)
        h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
        expected = torch.log_softmax(h64 @ w64.T, -1).gather(1, target[:, None])[:, 0]
        expected.backward(upstream.double())
        torch.testing.assert_close(logp.double(), expected, atol=atol * 10, rtol=1e-2)
        for ours, exact in ((h.grad, h64.grad), (w.grad, w64.grad)):
            assert (ours.double() - exact).norm() < atol * exact.norm()


def recipe(tiny, folder, **train):
    return tree(tiny, write_prompts(folder), folder / "run", {"name": "dar", "alpha": 0.1, "beta": 0.3}, **train) | {
        "model": {"name": str(tiny)}  # in bf16
    }


def test_a_whole_run(tiny, tmp_path):
    config = recipe(tiny, tmp_path, online_batches=40, lr=2e-3)
    run = dualign.train(config, reward=vowels)
    records = run.metrics()
    assert len(records) == 40 and all(np.isfinite(r["loss"]) for r in records)
    rewards = [r["reward"] for r in records]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    again = Engine.load(build(config | {"model": {"name": str(run.resumable())}}))
    assert again.device.type == "cuda"


def test_divided_with_one_process_is_whole_and_pi_0_rests_on_the_host(tiny, tmp_path):
    runs = []
    for shard in ("none", "full"):
        (tmp_path / shard).mkdir()
        config = recipe(tiny, tmp_path / shard, online_batches=1)
        config["train"]["shard"] = shard
        runs.append(dualign.train(config, reward=vowels, quiet=True))
    (one, record), (two, other) = [(run.batch(0).batch, run.metrics()[0]) for run in runs]
    assert torch.allclose(one.logp_old_NT, two.logp_old_NT, atol=1e-4)
    assert record["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    engine = Engine.load(build(recipe(tiny, tmp_path, online_batches=1)))
    assert sum(p.numel() for p in engine.reference.parameters()) == 0
    with engine.reference.whole():
        assert all(p.device.type == "cuda" and p.numel() for p in engine.reference.parameters())


def test_the_first_updates_forward_pass_gives_log_probs(tiny, tmp_path, monkeypatch):
    """As a pass of its own does, and the update is the same, up to the rounding of bf16."""
    batches = []
    for name, random in (("once", False), ("twice", True)):
        monkeypatch.setattr("dualign.training.engine.has_dropout", lambda model, random=random: random)
        (tmp_path / name).mkdir()
        run = dualign.train(recipe(tiny, tmp_path / name, online_batches=1), reward=vowels, quiet=True)
        batches.append((run.read_batch(0).batch, run.metrics()[0]))
    (one, record), (two, other) = batches
    assert torch.allclose(one.logp_old_NT, two.logp_old_NT, atol=0.1)
    assert torch.allclose(one["weight"], two["weight"], rtol=0.1)
    for name in ("loss", "grad_norm"):
        assert record[name] == pytest.approx(other[name], rel=0.03)
