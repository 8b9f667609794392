"""KL of whole distributions, token by token, is what it says, and agrees with log-ratios of samples."""

from __future__ import annotations

import pytest
import torch

from dualign.models.divergence import Divergence
from dualign.models.packing import Tokens
from dualign.models.policy import Policy
from tiny import make_model, make_tokenizer


@pytest.fixture(scope="module")
def policies() -> tuple[Policy, Policy]:
    tokenizer = make_tokenizer()
    ours, theirs = (Policy(make_model("llama", len(tokenizer), tokenizer.eos_token_id, s), "fp32") for s in (0, 1))
    return ours, theirs.freeze()


@pytest.mark.parametrize("plain", [True, False])
def test_it_is_the_sum_over_the_vocabulary(policies, plain, monkeypatch):
    ours, theirs = policies
    monkeypatch.setattr(ours, "plain_head", plain)
    monkeypatch.setattr("dualign.models.divergence.CHUNK", 3)
    tokens = Tokens(((1, 2, 3), (1, 2, 3), (4, 5)), ((6, 7, 8, 9), (6, 9), (10,)), (0, 0, 1))
    with torch.no_grad():
        found_NT = Divergence(ours, theirs)(ours.pack(tokens, [0, 1, 2], 0))
        for row, (prompt, completion) in enumerate(zip(tokens.prompt_ids, tokens.completion_ids, strict=True)):
            ids = torch.tensor([[*prompt, *completion]])
            p, q = (x.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for x in (ours, theirs))
            expected = torch.zeros(tokens.width)
            expected[: len(completion)] = (p.exp() * (p - q)).sum(-1)
            assert torch.allclose(found_NT[row], expected, atol=1e-5)
    assert Divergence(ours, ours)(ours.pack(tokens, [0, 1, 2], 0)).abs().max() < 1e-6
