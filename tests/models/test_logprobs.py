"""Chunked log-probs, packing and prompt sharing against the plain computation."""

from contextlib import nullcontext

import pytest
import torch
from torch._dynamo.utils import counters

from dualign.models import attention, logprobs
from dualign.models.attention import _attend, _attend_by_sdpa
from dualign.models.critic import Critic
from dualign.models.logprobs import token_logp
from dualign.models.master import LightEmbedding, Masters, joined, remainder
from dualign.models.packing import Tokens, deal, pack, plan, size_of
from dualign.models.policy import Policy, load_model
from dualign.models.settings import ModelConfig
from dualign.training.adafactor import Adafactor


def test_token_logp_and_its_gradients_match_log_softmax(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK", 7)
    monkeypatch.setattr(logprobs, "SLICE", 16)
    torch.manual_seed(0)
    hidden = torch.randn(23, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(50, 16, dtype=torch.float64, requires_grad=True)
    target, g = torch.randint(0, 50, (23,)), torch.randn(23, dtype=torch.float64)
    (token_logp(hidden, weight, weight.detach(), target) * g).sum().backward()
    ours = hidden.grad.clone(), weight.grad.clone()
    hidden.grad = weight.grad = None
    reference = torch.log_softmax(hidden @ weight.T, -1).gather(1, target[:, None])[:, 0]
    assert torch.allclose(token_logp(hidden, weight, weight.detach(), target).double(), reference, atol=1e-5)
    (reference * g).sum().backward()
    assert torch.allclose(ours[0], hidden.grad, atol=1e-5) and torch.allclose(ours[1], weight.grad, atol=1e-5)


def rows(seed=0, vocab=250):
    """Three prompts, with 4, 1 and 2 completions of several lengths (one of a single token)."""
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(0, vocab, (n,), generator=g).tolist())

    prompts = [ids(5), ids(11), ids(3)]
    group = (0, 0, 0, 0, 1, 2, 2)
    completions = tuple(ids(n) for n in (4, 9, 1, 6, 7, 2, 8))
    return Tokens(tuple(prompts[i] for i in group), completions, group)


def by_hand(model, tokens):
    out = torch.zeros(len(tokens), tokens.width)
    for i, (p, c) in enumerate(zip(tokens.prompt_ids, tokens.completion_ids, strict=True)):
        logp = torch.log_softmax(model(torch.tensor([p + c])).logits[0].float(), -1)
        out[i, : len(c)] = torch.stack([logp[len(p) + t - 1, y] for t, y in enumerate(c)])
    return out


@pytest.mark.parametrize("kind", ["tiny", "tiny_gpt2"])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("budget", [16, 64, 4096])
def test_packed_logprobs_equal_one_row_at_a_time(kind, share, budget, request):
    model, _ = load_model(ModelConfig(name=str(request.getfixturevalue(kind))))
    policy, tokens = Policy(model, "fp32", share), rows()
    assert policy.share == share and policy.plain_head
    out = torch.zeros(len(tokens), tokens.width)
    seen = []
    for part in plan(tokens, range(len(tokens)), budget):
        micro = pack(tokens, part, tokens.width, 0, share)
        out[micro.rows] = policy(micro).detach()
        seen += micro.rows.tolist()
    assert sorted(seen) == list(range(len(tokens)))
    assert torch.allclose(out, by_hand(model, tokens), atol=1e-5)


def test_prompt_sharing_gives_the_same_gradient(tiny):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    tokens, grads = rows(), []
    weight = torch.randn(len(tokens), 1)
    for share in (True, False):
        policy = Policy(model, "fp32", share)
        for part in plan(tokens, range(len(tokens)), 40):
            micro = pack(tokens, part, tokens.width, 0, share)
            (policy(micro) * weight[micro.rows]).sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-7)


def slow_flash(q, k, v, q_ends, k_ends, q_max, k_max, scale):
    """What FlashAttention's kernel for segments of several lengths computes, spelled out."""
    out, norm = torch.zeros_like(q), q.new_zeros(q.shape[1], len(q))
    for at, kt, weight, value in segments_of(q, k, v, q_ends, k_ends, scale):
        assert at.stop - at.start <= q_max and kt.stop - kt.start <= k_max
        norm[:, at] = torch.logsumexp(weight, -1)
        out[at] = (torch.softmax(weight, -1) @ value).transpose(0, 1)
    return out, norm


def slow_flash_backward(grad, q, k, v, out, norm, q_ends, k_ends, q_max, k_max, scale):
    """Its backward: softmax by the normaliser that it is given, and rowsum(dO O) of the output that it is given."""
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    groups = q.shape[1] // k.shape[1]
    for at, kt, weight, value in segments_of(q, k, v, q_ends, k_ends, scale):
        p = (weight - norm[:, at, None]).exp()
        g = grad[at].transpose(0, 1)
        ds = p * (g @ value.transpose(1, 2) - (grad[at] * out[at]).sum(-1).T[:, :, None])
        dq[at] = (ds @ k[kt].repeat_interleave(groups, 1).transpose(0, 1)).transpose(0, 1) * scale
        dk[kt] = (ds.transpose(1, 2) @ q[at].transpose(0, 1)).unflatten(0, (-1, groups)).sum(1).transpose(0, 1) * scale
        dv[kt] = (p.transpose(1, 2) @ g).unflatten(0, (-1, groups)).sum(1).transpose(0, 1)
    return dq, dk, dv


def segments_of(q, k, v, q_ends, k_ends, scale):
    groups = q.shape[1] // k.shape[1]
    for i in range(len(q_ends) - 1):
        at, kt = (slice(int(ends[i]), int(ends[i + 1])) for ends in (q_ends, k_ends))
        key, value = (x[kt].repeat_interleave(groups, 1).transpose(0, 1) for x in (k, v))
        weight = q[at].transpose(0, 1) @ key.transpose(1, 2) * scale
        queries, keys = weight.shape[1:]  # the last query sees the last key
        unseen = torch.ones(queries, keys, dtype=torch.bool).triu(1 + keys - queries)
        weight = weight.masked_fill(unseen, -torch.inf)
        yield at, kt, weight, value


@pytest.fixture
def spelled_out(monkeypatch):
    """FlashAttention where there is none."""
    monkeypatch.setattr(attention, "_flash", slow_flash)
    monkeypatch.setattr(attention, "_flash_backward", slow_flash_backward)


def test_attention_over_segments_is_attention_over_blocks(tiny, spelled_out):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy, tokens, found = Policy(model, "fp32", True), rows(), []
    weight = torch.randn(len(tokens), 1)
    for segments in (False, True):
        model.zero_grad()
        logps = torch.zeros(len(tokens), tokens.width)
        for part in plan(tokens, range(len(tokens)), 40):
            micro = pack(tokens, part, tokens.width, 0, True, segments)
            logp = policy(micro)
            (logp * weight[micro.rows]).sum().backward()
            logps[micro.rows] = logp.detach()
        found.append((logps, [p.grad.clone() for p in model.parameters()]))
    (blocks, block_grads), (flat, flat_grads) = found
    assert torch.allclose(flat, blocks, atol=1e-5)
    for a, b in zip(flat_grads, block_grads, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()) + 1e-7)


def backward_of_other_masks(grad, q, k, v, out, norm, q_ends, k_ends, q_max, k_max, scale):
    return [x.flip(0) for x in slow_flash_backward(grad, q, k, v, out, norm, q_ends, k_ends, q_max, k_max, scale)]


@pytest.mark.parametrize("backward", [slow_flash_backward, backward_of_other_masks])
def test_flash_attention_is_used_only_where_its_gradient_is_right(tiny, backward, monkeypatch):
    monkeypatch.setattr(attention, "_flash", slow_flash)
    monkeypatch.setattr(attention, "_flash_backward", backward)
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, "bf16", True).train()
    assert policy._try_flash() == (backward is slow_flash_backward)
    assert policy.training and all(p.grad is None for p in policy.parameters())


def test_a_padding_token_whose_embedding_is_zero_does_not_spoil_the_trial(tiny, spelled_out):
    """Through norms of zeros a gradient grows beyond all numbers."""
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, "bf16", True)
    for padding in {t for ids in policy._sample_tokens().prompt_ids for t in ids}:
        model.get_input_embeddings().padding_idx = padding
        ids = policy._sample_tokens()
        assert padding not in {t for row in (*ids.prompt_ids, *ids.completion_ids) for t in row}
    with torch.no_grad():
        model.get_input_embeddings().weight[padding] = 0
    assert policy._try_flash()


def test_logits_that_are_kept_for_backward_change_nothing(monkeypatch):
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(600, 16), torch.randn(90, 16), torch.randint(90, (600,))
    found = []
    for keep in (False, True):
        monkeypatch.setattr(logprobs, "_room_for_logits", lambda *_, keep=keep: keep)
        h, w = hidden.clone().requires_grad_(), torch.nn.Parameter(weight.clone())
        logp = token_logp(h, w, w.detach(), target)
        for _ in range(2):  # what is kept is used up by the first
            logp.backward(torch.arange(600.0), retain_graph=True)
        found.append([logp.detach(), h.grad, w.grad])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_layers_over_segments_are_one_graph_for_all_sizes(tiny, spelled_out, monkeypatch):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, "fp32", True)
    torch._dynamo.reset()
    counters.clear()
    kind = type(policy.base.layers[0])
    plain = kind.forward
    compiled = torch.compile(plain, backend="aot_eager", dynamic=True, fullgraph=True)
    for size in (4, 8, 12, 5):
        prompts = tuple(tuple(range(5, 12 + i // 4)) for i in range(size))
        completions = tuple(tuple((7 * i + 5 * j) % 250 for j in range(5 + 3 * i)) for i in range(size))
        tokens = Tokens(prompts, completions, tuple(i // 4 for i in range(size)))
        micro, found = pack(tokens, range(size), tokens.width, 0, True, True), []
        for forward in (plain, compiled):
            monkeypatch.setattr(kind, "forward", forward)
            policy.zero_grad()
            logp = policy(micro)
            logp.sum().backward()
            found.append([logp.detach(), *(p.grad.clone() for p in policy.parameters())])
        torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 1 < len(policy.base.layers), (
        "a length or layer has a program of its own"
    )


def test_sizes_of_compiled_layers_are_constants_but_for_their_tokens(tiny, spelled_out, compile_by):
    """Kernels that divide by a head's size as by a number that may change take many times as long."""
    sizes = []

    def backend(graph, inputs):
        values = (node.meta.get("example_value") for node in graph.graph.nodes)
        sizes.extend(str(n) for x in values if isinstance(x, torch.Tensor) for n in x.shape)
        return graph.forward

    counters.clear()
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, "fp32", True)
    with torch.compiler.config.patch(dynamic_sources=""):
        compile_by(policy, backend)
        for size in (8, 4, 12):
            completions = tuple(tuple(range(5 + 3 * i)) for i in range(size))
            tokens = Tokens(((5, 6, 7),) * size, completions, (0,) * size)
            policy(pack(tokens, range(size), tokens.width, 0, True, True))
    changing = {n for n in sizes if not n.isdigit()}
    assert changing and all(n.startswith("s") and n[1:].isdigit() for n in changing), changing
    assert counters["stats"]["unique_graphs"] == 1 < len(policy.base.layers)


def test_sharing_is_refused_where_attention_would_misread_the_mask(tiny):
    model, _ = load_model(ModelConfig(name=str(tiny), attention="eager"))
    policy, tokens = Policy(model, "fp32", True), rows()
    assert not policy.share
    micro = pack(tokens, range(len(tokens)), tokens.width, 0, share=False)
    assert torch.allclose(policy(micro), by_hand(model, tokens), atol=1e-5)


def test_a_head_that_caps_its_logits_is_not_taken_for_linear(tiny):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    forward = model.forward

    def capped(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.logits = 2 * torch.tanh(out.logits / 2)
        return out

    model.forward = capped
    policy, tokens = Policy(model, "fp32", False), rows()
    assert not policy.plain_head
    micro = pack(tokens, range(len(tokens)), tokens.width, 0, share=False)
    assert torch.allclose(policy(micro), by_hand(model, tokens), atol=1e-5)


def test_whole_prompts_stay_together_within_the_budget():
    tokens = rows()
    batches = plan(tokens, range(len(tokens)), 30)
    assert len(batches) > 1
    for part in batches:
        for other in batches:
            if other is not part:
                assert {tokens.group[i] for i in part}.isdisjoint({tokens.group[i] for i in other})


def test_without_sharing_padding_counts_towards_the_budget():
    tokens = rows()
    whole = [len(p) + len(c) for p, c in zip(tokens.prompt_ids, tokens.completion_ids, strict=True)]
    for part in plan(tokens, range(len(tokens)), 100, share=False):
        padded = pack(tokens, part, tokens.width, 0, share=False).input_ids.numel()
        assert padded == size_of(tokens, part, False) == len(part) * max(whole[i] for i in part)
        assert padded <= 100 or len({tokens.group[i] for i in part}) == 1


@pytest.mark.parametrize("world", [1, 2, 3])
def test_micro_batches_are_dealt_out_evenly_and_each_once(world):
    tokens = rows()
    parts = plan(tokens, range(len(tokens)), 30)
    hands = deal(tokens, parts, world, True)
    assert sorted(map(tuple, (part for hand in hands for part in hand))) == sorted(map(tuple, parts))
    loads = [sum(size_of(tokens, part, True) for part in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(size_of(tokens, part, True) for part in parts)


def test_attention_by_sdpa_is_attention_spelled_out():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 6, 5, 8), torch.randn(3, 2, 7, 8), torch.randn(3, 2, 7, 8)
    mask = torch.rand(3, 1, 5, 7) < 0.7
    mask[..., 0] = True
    assert torch.allclose(_attend(q, k, v, mask, 0.3, 0.0), _attend_by_sdpa(q, k, v, mask, 0.3, 0.0), atol=1e-6)


def test_a_rounded_copy_gives_the_very_same_numbers(tiny):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy, tokens = Policy(model, "bf16", True), rows()
    micro = pack(tokens, range(len(tokens)), tokens.width, 0, share=True)
    with torch.no_grad():
        assert torch.equal(policy(micro), policy.frozen_copy()(micro))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_copies_that_are_elsewhere_are_the_same_and_their_own(precision, tiny):
    """Where they come by way of the host's memory; weights that are tied stay so."""
    model, _ = load_model(ModelConfig(name=str(tiny)))
    model.config.tie_word_embeddings = True
    model.tie_weights()
    policy, tokens, host = Policy(model, precision, True), rows(), torch.device("cpu")
    micro = pack(tokens, range(len(tokens)), tokens.width, 0, share=True)
    frozen, critic, beside = policy.frozen_copy(host), Critic(policy, where=host), Critic(policy)
    with torch.no_grad():
        assert torch.equal(policy(micro), frozen(micro))
        assert torch.equal(critic.hidden(micro), beside.hidden(micro))
    assert frozen.model.get_input_embeddings().weight is frozen.model.get_output_embeddings().weight
    assert not any(p.requires_grad for p in frozen.parameters()) and all(p.requires_grad for p in critic.parameters())
    places = {p.data_ptr() for p in policy.parameters()}
    assert not places & {p.data_ptr() for module in (frozen, critic) for p in module.parameters()}


def test_masters_collect_the_gradient_that_autocast_gives(tiny):
    tokens, grads = rows(), []
    for rounded in (False, True):
        model, _ = load_model(ModelConfig(name=str(tiny)))
        policy = Policy(model, "bf16", True)
        masters = Masters([policy], policy.round() if rounded else {})
        assert bool(masters.rounded) == rounded
        for part in plan(tokens, range(len(tokens)), 40):
            policy(pack(tokens, part, tokens.width, 0, share=True)).sum().backward()
        grads.append([p.grad for p in masters.named.values()])
    assert all(p.dtype == torch.float32 for p in grads[1])
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, rtol=0.02, atol=0.02 * float(a.abs().max()))


def test_masters_in_halves_are_the_masters():
    torch.manual_seed(0)
    plain = torch.randn(10000) * 10.0 ** torch.randint(-30, 30, (10000,))
    odd = torch.tensor([0.0, -0.0, 1e-42, -1e-42, 3e38, -3e38, 1.0, -1.0])
    tie_up, tie_down = (
        torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x3F818000, 0x3F808000)
    )
    for x in (plain, odd, tie_up):
        rounded = x.to(torch.bfloat16)
        assert torch.equal(joined(rounded, remainder(x, rounded)).view(torch.int32), x.view(torch.int32))
    rounded = tie_down.to(torch.bfloat16)
    moved = joined(rounded, remainder(tie_down, rounded))
    assert moved.view(torch.int32) == tie_down.view(torch.int32) - 1 and torch.equal(moved.to(torch.bfloat16), rounded)
    assert torch.equal(joined(rounded, remainder(moved, rounded)), moved)  # and then stays


@pytest.mark.parametrize("one_at_a_time", [True, False])
def test_steps_on_masters_in_halves_are_steps_on_masters(tiny, one_at_a_time):
    found = []
    for halved in (False, True):
        model, _ = load_model(ModelConfig(name=str(tiny)))
        policy = Policy(model, "bf16")
        masters = Masters([policy], policy.round(), halved)
        assert masters.rounded
        if one_at_a_time:
            optimizer = Adafactor(masters.groups[0], lr=1e-3, opened=masters.opened)
        else:
            optimizer = torch.optim.AdamW(masters.groups[0], lr=1e-3)
        for _ in range(5):
            policy(policy.pack(rows(), [0, 1, 2, 3], 0)).sum().backward()
            with nullcontext() if one_at_a_time else masters.whole():
                optimizer.step()
            optimizer.zero_grad()
            policy.weights_changed()
        assert all(p.untyped_storage().nbytes() == 4 for p in masters.rounded) == halved
        with masters.whole():
            found.append([p.detach().clone() for p in masters.named.values()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("share", [False, True])
def test_gradients_added_up_in_place_are_those_of_plain_autograd(tiny, share):
    """Embedding and head are one parameter here, and the embedding's padding row learns from the head alone."""
    plain, tokenizer = load_model(ModelConfig(name=str(tiny)))
    tokens = rows()
    first = (tokenizer.pad_id, *tokens.prompt_ids[0][1:])
    prompts = tuple(first if g == tokens.group[0] else p for g, p in zip(tokens.group, tokens.prompt_ids, strict=True))
    tokens = Tokens(prompts, tokens.completion_ids, tokens.group)
    assert plain.get_input_embeddings().padding_idx == tokenizer.pad_id
    by_hand(plain, tokens).sum().backward()

    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, "fp32", share)
    assert type(model.get_input_embeddings()) is LightEmbedding and policy.plain_head
    for part in plan(tokens, range(len(tokens)), 30):
        policy(pack(tokens, part, tokens.width, 0, share)).sum().backward()
    for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5 * float(b.grad.abs().max()) + 1e-7), name


def test_a_copy_looks_up_and_learns_in_its_own_embedding(tiny):
    """As a frozen copy must when the policy that it was made from moves on."""
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy, tokens = Policy(model, "fp32", True), rows()
    micro = pack(tokens, range(len(tokens)), tokens.width, 0, share=True)
    frozen = policy.frozen_copy()
    before = frozen(micro)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.add_(0.1)
    policy(micro).sum().backward()
    assert torch.equal(frozen(micro), before) and not torch.allclose(policy(micro), before)
    assert all(p.grad is None for p in frozen.parameters())


def test_the_rounded_head_follows_its_weight(tiny):
    model, _ = load_model(ModelConfig(name=str(tiny)))
    policy = Policy(model, "bf16", True)
    before = policy.rounded_head().clone()
    assert policy.rounded_head() is policy.rounded_head()  # rounded once
    with torch.no_grad():
        policy.head.weight.mul_(2)
    assert torch.equal(policy.rounded_head(), 2 * before)
    other = policy.frozen_copy()
    with torch.no_grad():
        policy.head.weight.mul_(2)
    assert torch.equal(policy.rounded_head(), 4 * before) and torch.equal(other.rounded_head(), 2 * before)
