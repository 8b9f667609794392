"""DAR on completions of an older policy μ: the same optimum, whoever sampled."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import golden
from algos import reference
from algos.test_theory import SETTINGS, UNCLIPPED, World, X, Y, kl, table
from dualign.algos import ALGORITHMS, Batch
from dualign.algos.advantages import EPS, advantages
from dualign.algos.dar import DAR


def stale_batch(world: World, seed: int) -> Batch:
    """The population under a rational μ that is neither π_0 nor π_t."""
    generator = torch.Generator().manual_seed(seed)
    count_XY = torch.randint(1, 8, (X, Y), generator=generator)
    row_N = torch.arange(X * Y).repeat_interleave(count_XY.flatten())
    mu = count_XY.double() / count_XY.sum(-1, keepdim=True)
    return replace(world.at(row_N, world.pi_t), logp_behaviour_NT=mu.log().flatten()[row_N][:, None])


@pytest.mark.parametrize(("alpha", "beta"), SETTINGS)
@pytest.mark.parametrize("seed", range(3))
def test_the_stale_minimiser_is_the_optimum_whatever_sampled(alpha: float, beta: float, seed: int) -> None:
    """Thm 4.2 with y ~ μ: Σ_y μ(y) w(y) (-log π(y)) is least at π* ∝ π_0^α π_t^(1-α) exp(A/β), by its closed form (the
    shares of μ·w) and by its gradient through DAR.loss."""
    world = World(seed)
    batch = stale_batch(world, seed + 50)
    algo = DAR(alpha=alpha, beta=beta, w_clip=UNCLIPPED)
    batch = batch.having(algo.prepare(batch)[0])
    row_N = (batch.group_N * Y) + cell_of(world, batch)
    scale = (advantages(batch.reward_N, batch.group_N, "group").std() + EPS).item()
    best = (alpha * world.pi_0.log() + (1 - alpha) * world.pi_t.log() + world.reward / (beta * scale)).softmax(-1)

    mass = torch.zeros(X * Y).double().index_add(0, row_N, batch["weight"]).reshape(X, Y)
    torch.testing.assert_close(mass / mass.sum(-1, keepdim=True), best, rtol=1e-9, atol=1e-12)
    logits = best.log().clone().requires_grad_()
    loss = algo.loss(logits.log_softmax(-1).flatten()[row_N][:, None], batch)[0]
    loss.backward()
    assert logits.grad.abs().max() < 1e-12 * loss.abs()
    for other in range(5):  # and no other policy is better
        worse = table(other).log()
        assert algo.loss(worse.log_softmax(-1).flatten()[row_N][:, None], batch)[0] > loss


def cell_of(world: World, batch: Batch) -> Tensor:
    """Which completion each row is, by its log π_0."""
    logp_N = batch.seq_ref_N
    return (world.pi_0.log()[batch.group_N] - logp_N[:, None]).abs().argmin(-1)


def test_without_the_correction_the_minimiser_is_another() -> None:
    """The counter-check: rows of μ that are taken for rows of π_t lead elsewhere."""
    world = World()
    batch = replace(stale_batch(world, 50), logp_behaviour_NT=None)
    weight = DAR(alpha=0.5, beta=0.5, w_clip=UNCLIPPED).prepare(batch)[0]["weight"]
    row_N = (batch.group_N * Y) + cell_of(world, batch)
    mass = torch.zeros(X * Y).double().index_add(0, row_N, weight).reshape(X, Y)
    scale = (advantages(batch.reward_N, batch.group_N, "group").std() + EPS).item()
    best = (0.5 * world.pi_0.log() + 0.5 * world.pi_t.log() + world.reward / (0.5 * scale)).softmax(-1)
    assert kl(best, mass / mass.sum(-1, keepdim=True)) > 0.05


@pytest.mark.parametrize("settings", [{}, {"alpha": 0.0}, {"alpha": 1.0, "baseline": "batch"}, {"skip_below": 0.1}])
def test_sampled_from_pi_t_it_is_dar(settings: dict) -> None:
    """To the bit: weights, and what is logged."""
    batch = golden.batch_of(reference.make_case(), torch.float64)
    columns, stats = DAR(**settings).prepare(batch)
    again, numbers = DAR(**settings).prepare(replace(batch, logp_behaviour_NT=batch.logp_old_NT))
    assert numbers == stats and all(torch.equal(again[name], columns[name]) for name in columns)


def test_which_systems_take_such_rows() -> None:
    """The optimum of the others depends on who sampled."""
    assert {name for name, system in ALGORITHMS.items() if system.off_policy} == {"dar", "dpo", "dual_dpo", "gvpo"}
