"""Our Adafactor takes the library's steps."""

import pytest
import torch
from transformers.optimization import Adafactor as Library

from dualign.common.errors import UserError
from dualign.config import build
from dualign.training.adafactor import Adafactor
from dualign.training.checkpoint import load_state, save_state
from dualign.training.optimizer import Schedule
from runs_common import tree

SHAPES = [(7, 5), (2500, 3), (11,), (2, 6, 4), (7, 5), (11,), (2, 6, 4), (7, 5), ()]


@pytest.mark.parametrize("together", [1, 80, 10**6])  # one by one; two matrices at once, then the third; all of a shape
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_equal_the_librarys(weight_decay, together, tmp_path):
    torch.manual_seed(0)
    start = [torch.randn(shape) for shape in SHAPES]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    a = Adafactor(ours, lr=0.01, weight_decay=weight_decay, together=together)
    b = Library(theirs, lr=0.01, weight_decay=weight_decay, scale_parameter=False, relative_step=False)
    for step in range(10):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if i == 0 and step < 2:
                continue  # a weight that begins later has its own count of steps
            p.grad = torch.randn_like(p) * 10.0 ** (step - 5)
            q.grad = p.grad.clone()
        if step == 5:  # what was stepped on together is kept by parameter
            save_state(tmp_path, {}, a, {})
            a = Adafactor(ours, lr=0.01, weight_decay=weight_decay, together=together)
            load_state(tmp_path, {}, a)
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            assert torch.allclose(p, q, rtol=1e-5, atol=1e-6)
    assert all(not torch.allclose(p, s, atol=1e-3) for p, s in zip(ours, start, strict=True))


def shares(tiny, **train):
    config = build(tree(tiny, tiny / "x.jsonl", tiny / "run", {"name": "dar"}, **train))
    schedule = Schedule(config, torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    return [schedule.share(at) for at in range(config.train.online_batches * config.updates_per_batch)]


def test_a_rate_falls_as_its_schedule_says(tmp_path):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    cosine, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6), []
    for _ in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        cosine.step()
    assert shares(tmp_path, warmup=0, schedule="cosine") == pytest.approx(expected)
    assert shares(tmp_path, warmup=3, schedule="cosine")[:2] == pytest.approx([1 / 3, 2 / 3])
    assert shares(tmp_path, warmup=0, schedule="cosine", decay=0.5) == pytest.approx([1, 1, 1, 1, 0.75, 0.25])
    assert shares(tmp_path, warmup=0, schedule="linear") == shares(tmp_path, warmup=0, decay=1.0)
    assert shares(tmp_path, warmup=0, schedule="constant") == shares(tmp_path, warmup=0) == [1.0] * 6
    with pytest.raises(UserError, match="schedule: constant does not fall"):
        shares(tmp_path, schedule="constant", decay=0.5)


def test_a_zero_gradient_changes_nothing():
    p = torch.nn.Parameter(torch.ones(3, 4))
    p.grad = torch.zeros(3, 4)
    Adafactor([p], lr=0.1).step()
    assert torch.equal(p.detach(), torch.ones(3, 4))


def test_a_batch_of_more_updates_than_planned_never_climbs_back(tmp_path):
    found = tree(tmp_path, tmp_path / "p", tmp_path / "run", {"name": "grpo"}, warmup=0, schedule="linear")
    found["rollout"]["resample"] = 4
    config = build(found)
    schedule = Schedule(config, optimizer := torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0))
    rates = []
    for step, update in [(1, 1), (1, 3), (2, 0), (2, 1), (2, 3)]:  # two are planned
        schedule.set(step, update)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1 / 2, 1 / 2, 1 / 3, 1 / 6, 1 / 6])
