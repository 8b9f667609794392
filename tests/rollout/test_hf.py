"""The decode loop says what `generate` says, and its log-probs are the model's."""

import numpy as np
import pytest
import torch
from scipy import stats

from dualign.common.types import Prompt
from dualign.models.packing import Tokens, pack
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.rollout.base import Request, Sampling, uniforms
from dualign.rollout.hf import sampler as hf
from dualign.rollout.hf.draw import choose, inverse_cdf, nucleus
from dualign.rollout.hf.sampler import HFSampler

TEXTS = ["hi", "a much longer prompt than the others, to be padded", "what now?", "x"]


def setup(folder, precision="fp32"):
    model, tokenizer = load_model(ModelConfig(name=str(folder)))
    prompts = [Prompt(str(i), ({"role": "user", "content": t},)) for i, t in enumerate(TEXTS)]
    requests = [Request(i, p, tokenizer.prompt(p)) for i, p in enumerate(prompts)]
    return Policy(model, precision), tokenizer, requests


def draw(policy, tokenizer, requests, sampling, seed=(0, 0), rows=64):
    out = []
    HFSampler(policy, tokenizer, rows).sample(requests, sampling, seed, out.append)
    return sorted(out, key=lambda r: r.index)


@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
def test_greedy_equals_generate(kind, request):
    policy, tokenizer, requests = setup(request.getfixturevalue(kind))
    ours = draw(policy, tokenizer, requests, Sampling(1, 40, 0.0))
    for r, rollout in zip(requests, ours, strict=True):
        theirs = policy.model.generate(
            torch.tensor([r.prompt_ids]), max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_id
        )[0, len(r.prompt_ids) :].tolist()
        assert list(rollout.completion_ids) == theirs


@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.9, 0.95), (0.7, 1.0), (1.0, 1.0)])
def test_recorded_logprobs_are_a_full_forward_pass(kind, temperature, top_p, request):
    policy, tokenizer, requests = setup(request.getfixturevalue(kind))
    rollouts = draw(policy, tokenizer, requests, Sampling(16, 60, temperature, top_p))
    assert any(r.finish == "eos" and len(r.completion_ids) < 50 for r in rollouts), "rows must have been dropped midway"
    for r in rollouts:
        ids = torch.tensor([r.prompt_ids + r.completion_ids])
        with torch.no_grad():
            logp = torch.log_softmax(policy.model(ids).logits[0].double(), -1)
        start = len(r.prompt_ids)
        expected = [logp[start + t - 1, c].item() for t, c in enumerate(r.completion_ids)]
        np.testing.assert_allclose(r.sampler_logp, expected, atol=5e-5)


def test_compiled_layers_decode_alike_and_are_compiled_once(tiny, compile_by):
    policy, tokenizer, requests = setup(tiny)
    sampling, graphs = Sampling(15, 60, 1.0), []  # no number of rows is one of the model's sizes
    plain = draw(policy, tokenizer, requests, sampling)

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compile_by(policy, counted)
    compiled = draw(policy, tokenizer, requests, sampling)
    assert [r.completion_ids for r in compiled] == [r.completion_ids for r in plain]
    draw(policy, tokenizer, requests, sampling, rows=45)
    assert len({r.finish for r in plain}) == 2, "rows must have been dropped midway"
    pieces = len(graphs)  # before the cache's change, before attention, after it: as many for one layer as for all
    graphs.clear()
    torch._dynamo.reset()
    del policy.base.layers[1:]
    policy.model.config.num_hidden_layers = 1
    draw(policy, tokenizer, requests, sampling)
    assert 0 < pieces == len(graphs), "compiled anew for other layers, lengths or numbers of rows"


def test_where_the_compiler_fails_layers_go_on_as_they_are(tiny, compile_by, caplog):
    policy, tokenizer, requests = setup(tiny)
    plain = draw(policy, tokenizer, requests, Sampling(8, 60, 1.0))

    def failing(graph, inputs):
        raise NotImplementedError("an operator that nobody knows")

    compile_by(policy, failing)
    found = draw(policy, tokenizer, requests, Sampling(8, 60, 1.0))
    assert [r.completion_ids for r in found] == [r.completion_ids for r in plain]
    assert caplog.text.count("continuing without compiled layers") == 1


def test_memory_that_does_not_suffice_is_not_taken_for_a_failing_compiler(tiny, compile_by):
    policy, tokenizer, requests = setup(tiny)

    def failing(graph, inputs):
        raise RuntimeError("CUDA out of memory")

    compile_by(policy, failing)
    with pytest.raises(Exception, match="out of memory"):
        draw(policy, tokenizer, requests, Sampling(8, 60, 1.0))


@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
@pytest.mark.parametrize("tokens", [1, 60, 100])
def test_prompts_in_slices_are_prompts_at_once(kind, tokens, request, monkeypatch):
    """Whatever the memory of the cache held before: a masked position weighs nothing, but nothing times NaN is NaN."""
    policy, tokenizer, requests = setup(request.getfixturevalue(kind))
    whole = draw(policy, tokenizer, requests, Sampling(3, 20, 0.9))
    assert len(list(hf._slices(sorted(requests, key=lambda r: -len(r.prompt_ids))))) == 1
    monkeypatch.setattr(hf, "PREFILL", tokens)
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda x, *size, **k: x.new_full(size, float("nan"), **k))
    assert len(list(hf._slices(sorted(requests, key=lambda r: -len(r.prompt_ids))))) > 1
    sliced = draw(policy, tokenizer, requests, Sampling(3, 20, 0.9))
    for a, b in zip(whole, sliced, strict=True):
        assert a.completion_ids == b.completion_ids
        np.testing.assert_allclose(a.sampler_logp, b.sampler_logp, atol=1e-5)


def test_eos_is_scored_padding_never_and_a_cut_completion_is_not_closed(tiny):
    policy, tokenizer, requests = setup(tiny)
    assert tokenizer.pad_id == tokenizer.eos_id, "the awkward case: the model's pad is its EOS"
    rollouts = draw(policy, tokenizer, requests, Sampling(16, 40, 1.0))
    ended = [r for r in rollouts if r.finish == "eos"]
    cut = [r for r in rollouts if r.finish == "length"]
    assert ended and cut
    assert all(
        r.completion_ids[-1] == tokenizer.eos_id and tokenizer.eos_id not in r.completion_ids[:-1] for r in ended
    )
    assert all(tokenizer.eos_id not in r.completion_ids and len(r.completion_ids) == 40 for r in cut)
    tokens = Tokens(
        tuple(r.prompt_ids for r in rollouts),
        tuple(r.completion_ids for r in rollouts),
        tuple(r.group for r in rollouts),
    )
    with torch.no_grad():
        logp = policy(pack(tokens, range(len(rollouts)), tokens.width, tokenizer.pad_id, share=False))
    for i, r in enumerate(rollouts):
        n = len(r.completion_ids)
        assert (logp[i, :n] < 0).all(), "every token of the completion, EOS included, has a log-prob"
        assert (logp[i, n:] == 0).all(), "nothing beyond it has"


def test_a_row_depends_on_seed_batch_and_row_alone(tiny):
    policy, tokenizer, requests = setup(tiny)
    s = Sampling(4, 20, 0.9)
    whole = draw(policy, tokenizer, requests, s, (5, 3))
    parts = [r for i in (2, 0, 3, 1) for r in draw(policy, tokenizer, requests[i : i + 1], s, (5, 3))]
    assert whole == draw(policy, tokenizer, requests, s, (5, 3), rows=4) or [r.completion_ids for r in whole] == [
        r.completion_ids for r in draw(policy, tokenizer, requests, s, (5, 3), rows=4)
    ]
    assert [r.completion_ids for r in whole] == [r.completion_ids for r in sorted(parts, key=lambda r: r.index)]
    assert [r.completion_ids for r in whole] != [r.completion_ids for r in draw(policy, tokenizer, requests, s, (5, 4))]
    assert [r.completion_ids for r in whole] != [r.completion_ids for r in draw(policy, tokenizer, requests, s, (6, 3))]


def test_nothing_to_sample_is_nothing_to_try(tiny):
    policy, tokenizer, _ = setup(tiny, "bf16")
    policy.round()
    sampler = HFSampler(policy, tokenizer, 8)
    sampler.sample([], Sampling(4, 8, 1.0), (0, 0), pytest.fail)
    assert sampler.agrees is None, "found out on no prompt at all"


def test_uniforms_are_uniform_and_distinct():
    draws = np.concatenate([uniforms((s, b), r, 16) for s in range(4) for b in range(8) for r in range(64)])
    assert stats.kstest(draws, "uniform").pvalue > 1e-3
    assert len(np.unique(draws)) == len(draws)


def test_inverse_cdf_draws_from_the_distribution():
    torch.manual_seed(0)
    weight = torch.softmax(2 * torch.randn(1000), -1)
    n = 200_000
    u = torch.from_numpy(uniforms((0, 0), 0, n))
    tokens = torch.cat([inverse_cdf(weight.expand(1000, -1), part) for part in u.split(1000)])
    counts = torch.bincount(tokens, minlength=1000).double().numpy()
    expected = weight.double().numpy() / weight.double().sum().item() * n
    common = expected >= 5
    assert (
        stats.chisquare(
            np.append(counts[common], counts[~common].sum()), np.append(expected[common], expected[~common].sum())
        ).pvalue
        > 1e-3
    )


def test_inverse_cdf_never_draws_what_has_no_mass():
    weight = torch.zeros(4, 600)
    weight[:, [3, 255, 256, 511, 599]] = torch.tensor([1e-30, 1.0, 1e-9, 3.0, 1e-12])
    for u in (0.0, 1e-18, 0.25, 0.5, 1 - 1e-16):
        drawn = inverse_cdf(weight, torch.full((4,), u, dtype=torch.float64))
        assert (weight.gather(1, drawn[:, None]) > 0).all()


def test_nucleus_keeps_the_smallest_set():
    weight = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    assert (nucleus(weight, 0.8) > 0).tolist() == [[True, True, False, False]]
    assert (nucleus(weight, 0.81) > 0).tolist() == [[True, True, True, False]]
    assert (nucleus(weight, 0.01) > 0).tolist() == [[True, False, False, False]]


def test_logprob_is_of_the_untempered_model():
    logits = torch.randn(3, 50)
    token, logp = choose(logits, Sampling(1, 1, 0.5), torch.rand(3, dtype=torch.float64))
    assert torch.allclose(logp, torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0], atol=1e-6)
