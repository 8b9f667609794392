"""β by a trust region and α by a budget on the KL: exact on batches of numbers, and in closed loop on tabular policies."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algos.test_dar import batch_of
from algos.test_theory import UNCLIPPED, World, X, Y
from dualign.algos.adaptive import BETA_RANGE, next_alpha, trust_region, weights_kl
from dualign.algos.dar import DAR

LEVELS = st.lists(st.integers(1, 10).map(float), min_size=2, max_size=40).filter(lambda r: len(set(r)) > 1)


@settings(deadline=None, max_examples=25)
@given(LEVELS, st.floats(0.05, 0.95))
def test_beta_puts_the_weights_at_epsilon_and_minimises_the_dual(reward: list[float], share: float) -> None:
    """`share` of the largest KL that the ties at the top allow."""
    A_N = torch.tensor(reward, dtype=torch.float64)
    A_N = (A_N - A_N.mean()) / A_N.std()
    epsilon = share * math.log(len(A_N) / int((A_N.max() == A_N).sum()))
    beta = trust_region(A_N, epsilon)
    assert beta is not None
    q_N = (A_N / beta).softmax(0)
    assert float((q_N * (q_N * len(q_N)).log()).nansum()) == pytest.approx(epsilon, rel=1e-9, abs=1e-12)
    # β ε + β log mean exp(A/β) is convex in β: stationary at the β found, and higher to both sides
    b = torch.tensor(beta, dtype=torch.float64, requires_grad=True)
    value = dual(b, A_N, epsilon)
    value.backward()
    assert b.grad is not None and abs(b.grad) < 1e-9
    assert all(dual(torch.tensor(beta * factor), A_N, epsilon) > value for factor in (0.5, 0.9, 1.1, 2.0))


def dual(beta: Tensor, A_N: Tensor, epsilon: float) -> Tensor:
    return beta * epsilon + beta * ((A_N / beta).logsumexp(0) - math.log(len(A_N)))


@settings(deadline=None, max_examples=25)
@given(LEVELS)
def test_the_weights_are_nearer_to_uniform_the_larger_beta_and_beta_the_smaller_epsilon(reward: list[float]) -> None:
    A_N = torch.tensor(reward, dtype=torch.float64)
    A_N = (A_N - A_N.mean()) / A_N.std()
    kls = [weights_kl(A_N, beta) for beta in (0.1, 0.2, 0.5, 1, 2, 5, 20)]
    assert all(a > b - 1e-12 for a, b in pairwise(kls)) and kls[2] > kls[-1] > 0
    betas = [trust_region(A_N, epsilon) for epsilon in (1e-3, 1e-2, 0.1, 0.3, 1.0, 3.0)]
    assert all(a >= b for a, b in pairwise(betas))


def test_what_no_beta_reaches_is_said() -> None:
    """Three rows, the two best tied: at most log(3/2) nats."""
    algo, batch = DAR(alpha=0.0, epsilon=0.5, w_clip=1e9), batch_of([1, 3, 3], [0, 0, 0])
    columns, stats = algo.prepare(batch)
    assert stats["beta_found"] == BETA_RANGE[0] and stats["beta_bounded"] == 1
    assert stats["weights_kl"] == pytest.approx(math.log(1.5))
    assert columns["weight"].isfinite().all() and columns["weight"][0] < 1e-9
    _, stats = DAR(alpha=0.0, epsilon=0.4).prepare(batch)
    assert stats["beta_bounded"] == 0 and stats["weights_kl"] == pytest.approx(0.4)
    _, stats = DAR(alpha=0.0, epsilon=1e-9).prepare(batch)
    assert stats["beta_found"] == pytest.approx(BETA_RANGE[1]) and stats["beta_bounded"] == 1


@pytest.mark.parametrize(("reward", "group"), [([2, 2, 2, 2], [0, 0, 1, 1]), ([5], [0])])
def test_without_a_difference_beta_is_as_set_and_weights_are_those_of_the_references(
    reward: list[float], group: list[int]
) -> None:
    ratio = [0.3] * len(reward)
    columns, stats = DAR(alpha=0.5, epsilon=0.5).prepare(batch_of(reward, group, ratio))
    assert columns["weight"].tolist() == pytest.approx([math.exp(0.15)] * len(reward))
    assert (stats["beta_found"], stats["weights_kl"], stats["beta_bounded"]) == (pytest.approx(0.05), 0, 1)


def test_alpha_rises_above_the_budget_and_falls_below_it() -> None:
    for kl, way in [(8.0, 1), (4.4, 1), (3.6, -1), (0.0, -1), (-0.1, -1)]:
        level, alpha = next_alpha(0.2, kl, 4.0, 0.1, 0.01)
        assert (math.log(level / 0.2) * way > 0) and (math.log(alpha / level) * way > 0)
    assert next_alpha(0.2, 4.0, 4.0, 0.1, 0.01) == (0.2, 0.2)
    assert next_alpha(0.2, 1e9, 4.0, 0.1, 0.01)[0] == pytest.approx(
        0.2 * math.exp(0.1)
    )  # one wild batch moves it no further
    assert next_alpha(0.99, 100, 4.0, 0.1, 0.01) == (1, 1) and next_alpha(0.0101, 0, 4.0, 0.1, 0.01) == (0.01, 0.01)


def test_alpha_is_handed_on() -> None:
    """The first batch begins with `alpha`; what it leaves decides the second's weights."""
    algo, batch = DAR(alpha=0.2, kl_budget=1.0), batch_of([1, 1], [0, 0], [-3.0, -5.0])
    columns, first = algo.prepare(batch)
    assert first == first | {"alpha_found": 0.2, "alpha_level": 0.2, "kl_sampled": 4.0}
    assert columns["weight"].tolist() == pytest.approx([math.exp(-0.6), math.exp(-1.0)])
    columns, second = algo.prepare(replace(batch, carried={name: first[name] for name in algo.carried}))
    level, alpha = next_alpha(0.2, 4.0, 1.0, algo.alpha_rate, algo.alpha_lowest)
    assert (second["alpha_level"], second["alpha_found"]) == (level, alpha)
    assert columns["weight"].tolist() == pytest.approx([math.exp(-3 * alpha), math.exp(-5 * alpha)])


def test_the_kl_is_that_of_the_policy_that_sampled() -> None:
    batch = batch_of([1, 2, 1, 2], [0, 0, 1, 1], [-1.0, -3.0, -7.0, -9.0])
    algo = DAR(kl_budget=1.0)
    assert algo.prepare(batch)[1]["kl_sampled"] == 5
    stale = replace(batch, logp_behaviour_NT=batch.logp_ref_NT + 0.5)
    assert algo.prepare(stale)[1]["kl_sampled"] == pytest.approx(0.5)


@pytest.mark.parametrize("budget", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("step", [1.0, 0.1], ids=["to the minimiser", "a tenth of the way"])
def test_the_kl_ends_at_its_budget(budget: float, step: float) -> None:
    """A tabular policy in closed loop, sampled: 64 completions a prompt, weighted by DAR.prepare; its logits go to the
    minimiser, or a part of the way there. Over the last 50 batches KL(π‖π_0) is within 10 % of its budget."""
    world = World()
    algo = DAR(alpha=0.3, beta=2.0, w_clip=UNCLIPPED, baseline="batch", kl_budget=budget)
    generator = torch.Generator().manual_seed(3)
    pi, carried, kls = world.pi_0, {}, []
    every_N = torch.arange(X * Y)
    for _ in range(200):
        row_N = (
            torch.multinomial(pi, 64, replacement=True, generator=generator) + Y * torch.arange(X)[:, None]
        ).flatten()
        sampled = replace(world.at(row_N, pi), carried=carried)
        stats = algo.prepare(sampled)[1]  # what is measured is of the sample
        weight = algo.prepare(replace(world.at(every_N, pi), carried=carried))[0]["weight"].reshape(X, Y)
        carried = {name: stats[name] for name in algo.carried}
        pi = (pi.log() + step * weight.log()).softmax(-1)
        kls.append(float((pi * (pi / world.pi_0).log()).sum(-1).mean()))
    assert sum(kls[-50:]) / 50 == pytest.approx(budget, rel=0.1)
    assert 0.01 < stats["alpha_found"] < 1
