"""The papers' theory on tabular policies, exactly: expectations are sums, nothing is sampled.

A policy is a table (X prompts, Y completions); a completion is one token. Where an expectation over y ~ π_t is wanted
from the project's own batch code, the batch *is* the population: π_t has rational probabilities n_y/n and completion y
stands in the batch n_y times, so that means over rows are expectations, the group's mean is V^π_t(x), and A is that of
Theorem 4.2 up to the batch's σ_A, which the temperature takes up.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dualign.algos import Batch
from dualign.algos.advantages import EPS
from dualign.algos.dao import DAO
from dualign.algos.dar import DAR

X, Y = 3, 5
SETTINGS = [(0.0, 0.5), (0.1, 0.3), (0.5, 0.5), (1.0, 1.0)]
UNCLIPPED = 1e300


def table(seed: int) -> Tensor:
    """A random positive policy. (X, Y)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(X, Y, generator=generator, dtype=torch.float64).log_softmax(-1).exp()


class World:
    """π_0, a rational π_t, rewards, and the population batch under π_t."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.pi_0 = table(seed + 100)
        count_XY = torch.stack([torch.randperm(Y, generator=generator) + 1 for _ in range(X)])  # each row sums to 15
        self.pi_t = count_XY.double() / count_XY.sum(-1, keepdim=True)
        self.reward = torch.randint(1, 11, (X, Y), generator=generator).double()
        self.row_N = torch.arange(X * Y).repeat_interleave(count_XY.flatten())  # which (x, y) each row of the batch is
        self.batch = self.at(self.row_N, self.pi_t)

    def at(self, row_N: Tensor, pi_t: Tensor) -> Batch:
        def column(t: Tensor) -> Tensor:
            return t.flatten()[row_N]

        return Batch(
            group_N=row_N // Y,
            mask_NT=torch.ones(len(row_N), 1, dtype=torch.float64),
            reward_N=column(self.reward),
            logp_old_NT=column(pi_t.log())[:, None],
            logp_ref_NT=column(self.pi_0.log())[:, None],
        )

    @property
    def advantage(self) -> Tensor:
        """r - V^π_t(x). (X, Y)"""
        return self.reward - (self.pi_t * self.reward).sum(-1, keepdim=True)

    @property
    def scale(self) -> float:
        """What Algorithm 1 divides A by: σ over the population (μ is 0), the unbiased estimate of it."""
        return self.advantage.flatten()[self.row_N].std().item() + EPS

    def optimum(self, alpha: float, beta: float) -> Tensor:
        """π* ∝ π_0^α π_t^(1-α) exp(A/β) (Theorem 4.2), at the advantages' own scale. (X, Y)"""
        return (alpha * self.pi_0.log() + (1 - alpha) * self.pi_t.log() + self.advantage / beta).softmax(-1)

    def objective(self, pi: Tensor, alpha: float, beta: float) -> Tensor:
        """Eq. 3: E_π[A] - β (α KL(π‖π_0) + (1-α) KL(π‖π_t)), summed over prompts."""
        return (pi * self.advantage).sum() - beta * (alpha * kl(pi, self.pi_0) + (1 - alpha) * kl(pi, self.pi_t))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def dar_loss(world: World, algo: DAR) -> tuple[Batch, float]:
    """The population batch with DAR's weights, and the temperature at the advantages' own scale."""
    return world.batch.having(algo.prepare(world.batch)[0]), algo.beta * world.scale


def loss_of(logits: Tensor, world: World, algo: DAR | DAO, batch: Batch) -> Tensor:
    """The project's loss of a softmax policy on the population. logits: (X, Y)"""
    logp_NT = logits.log_softmax(-1).flatten()[world.row_N][:, None]
    return algo.loss(logp_NT, batch)[0] / algo.denominator(batch)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_dual_kl_is_a_single_kl(alpha: float, beta: float) -> None:
    """Prop. 4.1: against π_0^α π_t^(1-α)/C(x) the objective differs by β Σ log C(x), whatever θ is."""
    world = World()
    mixture = world.pi_0**alpha * world.pi_t ** (1 - alpha)
    C = mixture.sum(-1, keepdim=True)
    for seed in range(20):
        pi = table(seed)
        single = (pi * world.advantage).sum() - beta * kl(pi, mixture / C)
        torch.testing.assert_close(
            world.objective(pi, alpha, beta), single + beta * C.log().sum(), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_dao_is_the_dual_kl_objective(alpha: float, beta: float) -> None:
    """DAO's PPO style on the population is minus Eq. 3, in units of σ_A; its REINFORCE style has, at π_θ = π_t, the
    objective's gradient (App. A.4)."""
    world = World()
    objective = DAO(alpha=alpha, beta=beta, variant="ppo")
    batch = world.batch.having(objective.prepare(world.batch)[0])
    for seed in range(5):
        logits = table(seed).log()
        want = -world.objective(logits.softmax(-1), alpha, beta * world.scale) / world.scale / X
        torch.testing.assert_close(loss_of(logits, world, objective, batch), want, rtol=1e-10, atol=1e-10)
    gradients = []
    for variant in ("ppo", "reinforce"):
        logits = world.pi_t.log().clone().requires_grad_()
        algo = DAO(alpha=alpha, beta=beta, variant=variant)
        loss_of(logits, world, algo, batch).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
def test_the_optimum_beats_every_other_policy(alpha: float, beta: float) -> None:
    """Thm 4.2: J(π*) - J(π) = β KL(π‖π*) for every π."""
    world = World()
    best = world.optimum(alpha, beta)
    for seed in range(20):
        pi = table(seed)
        gap = world.objective(best, alpha, beta) - world.objective(pi, alpha, beta)
        torch.testing.assert_close(gap, beta * kl(pi, best), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_dar_is_minimised_by_the_optimum(alpha: float, beta: float, seed: int) -> None:
    """Thm 4.2: DAR's unclipped population loss has gradient 0 at π*, is convex in the logits, and a minimiser that
    starts anywhere arrives at π*. All through DAR.prepare and DAR.loss."""
    world, algo = World(seed), DAR(alpha=alpha, beta=beta, w_clip=UNCLIPPED)
    batch, temperature = dar_loss(world, algo)
    best = world.optimum(alpha, temperature)

    logits = best.log().clone().requires_grad_()
    loss = loss_of(logits, world, algo, batch)
    loss.backward()
    assert logits.grad.abs().max() < 1e-12 * loss.abs()

    at = table(seed + 7).log()
    hessian = torch.autograd.functional.hessian(lambda t: loss_of(t, world, algo, batch), at).reshape(X * Y, X * Y)
    spectrum = torch.linalg.eigvalsh(hessian)
    assert spectrum[0] > -1e-12 * spectrum[-1]
    assert (spectrum > 1e-9 * spectrum[-1]).sum() == X * (Y - 1)  # flat only along the X shifts of the logits

    # per prompt the loss is scaled by Z(x); dividing by it changes the steps, not the minimiser
    Z_N = torch.zeros(X).double().index_add(0, batch.group_N, batch["weight"])[batch.group_N]
    scaled = batch.having({"weight": batch["weight"] / Z_N})
    found = table(seed + 11).log().clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [found], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss_of(found, world, algo, scaled)
        value.backward()
        return value

    optimizer.step(closure)
    assert kl(best, found.detach().softmax(-1)) < 1e-6


def test_a_clip_moves_the_minimiser() -> None:
    """The counter-check: with w_clip 20 the population loss is no longer stationary at π*."""
    world = World()
    algo = DAR(alpha=0.1, beta=0.05)
    batch, temperature = dar_loss(world, algo)
    logits = world.optimum(0.1, temperature).log().clone().requires_grad_()
    loss_of(logits, world, algo, batch).backward()
    assert batch["clipped"].any() and logits.grad.abs().max() > 1e-2


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0])
def test_iteration_settles_at_the_rlhf_optimum(alpha: float) -> None:
    """π_{t+1} = π* ∝ π_t w(π_t) converges to π_0 exp(r/(αβ)): the α-interpolation only slows the way there.

    The weights are DAR.prepare's on one row per (x, y), with the batch's mean as the baseline, whose σ_A does not
    depend on π_t. The distance in logits shrinks by exactly 1-α a step."""
    world, algo = World(), DAR(alpha=alpha, beta=2.0, w_clip=UNCLIPPED, baseline="batch")
    every_N = torch.arange(X * Y)
    temperature = 2.0 * (world.reward.std().item() + EPS)
    goal = (world.pi_0.log() + world.reward / (alpha * temperature)).log_softmax(-1)

    def distance(pi: Tensor) -> Tensor:
        gap = pi.log() - goal
        return (gap - gap.mean(-1, keepdim=True)).norm()

    pi, steps = world.pi_t, 0
    start = distance(pi)
    while distance(pi) > 1e-9 and steps < 400:
        weight = algo.prepare(world.at(every_N, pi))[0]["weight"].reshape(X, Y)
        pi = pi * weight / (pi * weight).sum(-1, keepdim=True)
        steps += 1
        if distance(pi) > 1e-6:
            torch.testing.assert_close(distance(pi), start * (1 - alpha) ** steps, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(pi, goal.exp(), rtol=1e-8, atol=1e-12)


def test_without_pi_0_iteration_collapses() -> None:
    """α = 0 has no fixed point short of the best completion: why DAR keeps π_0."""
    world, algo = World(), DAR(alpha=0.0, beta=2.0, w_clip=UNCLIPPED, baseline="batch")
    pi = world.pi_t
    for _ in range(200):
        weight = algo.prepare(world.at(torch.arange(X * Y), pi))[0]["weight"].reshape(X, Y)
        pi = pi * weight / (pi * weight).sum(-1, keepdim=True)
    top = world.reward == world.reward.max(-1, keepdim=True).values
    torch.testing.assert_close((pi * top).sum(-1), torch.ones(X).double(), rtol=0, atol=1e-6)
