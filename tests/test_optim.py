"""Our Adafactor takes the library's steps."""

import pytest
import torch
from transformers.optimization import Adafactor as Library

from dualign.optim import Adafactor


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_equal_the_librarys(weight_decay):
    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(2500, 3), torch.randn(11), torch.randn(2, 6, 4)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a = Adafactor(ours, lr=0.01, weight_decay=weight_decay)
    b = Library(theirs, lr=0.01, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    for step in range(10):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn_like(p) * 10.0 ** (step - 5)
            q.grad = p.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    assert all(not torch.allclose(p, s, atol=1e-3) for p, s in zip(ours, start, strict=True))


def test_a_zero_gradient_changes_nothing():
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.zeros(3, 4)
    Adafactor([p], lr=0.1).step()
    assert torch.equal(p.detach(), torch.ones(3, 4))
