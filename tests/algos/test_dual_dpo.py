"""Dual-KL DPO on tabular policies, exactly, and where its π_t comes from in a run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import dualign
import golden
from algos import reference
from algos.test_theory import X, Y, table
from dualign.algos import ALGORITHMS, Batch
from dualign.algos.dpo import DPO
from dualign.algos.dual_dpo import DualDPO
from dualign.training.engine import Engine
from runs_common import tree, write_pairs


def pairs_of(pi_t: Tensor, pi_0: Tensor) -> tuple[Batch, Tensor, Tensor]:
    """Every ordered pair of completions of every prompt, as a group of two one-token rows; the prompts and the
    completions of the rows."""
    cells = [(x, a, b) for x in range(X) for a in range(Y) for b in range(Y) if a != b]
    x_N = torch.tensor([x for x, _, _ in cells]).repeat_interleave(2)
    y_N = torch.tensor([[a, b] for _, a, b in cells]).flatten()
    batch = Batch(
        group_N=torch.arange(len(cells)).repeat_interleave(2),
        mask_NT=torch.ones(len(y_N), 1, dtype=torch.float64),
        reward_N=torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(len(cells)),
        logp_old_NT=pi_t[x_N, y_N].log()[:, None],
        logp_ref_NT=pi_0[x_N, y_N].log()[:, None],
    )
    return batch, x_N, y_N


def population_loss(algo: DualDPO, logits: Tensor, pi_t: Tensor, pi_0: Tensor, reward: Tensor, of: Tensor) -> Tensor:
    """E[-log σ(β h)] over pairs that come up in proportion `of` (X, Y, Y), each won with probability σ(r - r')."""
    batch, x_N, y_N = pairs_of(pi_t, pi_0)
    score_N = algo.score(logits.log_softmax(-1)[x_N, y_N][:, None], batch)
    x, w, loser = x_N[::2], y_N[::2], y_N[1::2]
    probability = of[x, w, loser] * (reward[x, w] - reward[x, loser]).sigmoid()
    return (probability * algo.pair_loss(score_N[::2] - score_N[1::2])).sum()


@pytest.mark.parametrize(("alpha", "beta"), [(0.0, 0.5), (0.1, 0.1), (0.5, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_fixed_point_is_the_dual_kl_optimum(alpha: float, beta: float, seed: int) -> None:
    """π* ∝ π_0^α π_t^(1-α) exp(r/β), for labels of Bradley and Terry, whichever pairs come up (so whoever sampled)."""
    generator = torch.Generator().manual_seed(seed)
    pi_0, pi_t, reward = table(seed), table(seed + 9), 2 * torch.rand(X, Y, generator=generator).double()
    of = torch.rand(X, Y, Y, generator=generator).double() + 0.1
    of = of + of.transpose(1, 2)  # a pair comes up in either order
    best = (alpha * pi_0.log() + (1 - alpha) * pi_t.log() + reward / beta).log_softmax(-1)
    algo = DualDPO(alpha=alpha, beta=beta)
    logits = best.clone().requires_grad_()
    loss = population_loss(algo, logits, pi_t, pi_0, reward, of)
    loss.backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12
    for other in range(5):
        assert population_loss(algo, best + 0.3 * table(other), pi_t, pi_0, reward, of) > loss


def test_iterating_it_settles_at_the_rlhf_optimum() -> None:
    """π_{t+1} = π*, as DAR's: π_0 exp(r/(αβ))."""
    alpha, beta, pi_0 = 0.5, 1.0, table(0)
    reward, pi = torch.arange(X * Y).reshape(X, Y).double() % 4, table(1)
    for _ in range(80):
        pi = (alpha * pi_0.log() + (1 - alpha) * pi.log() + reward / beta).softmax(-1)
    torch.testing.assert_close(pi, (pi_0.log() + reward / (alpha * beta)).softmax(-1))
    # and there its own loss has gradient 0 with π_t = π
    logits = pi.log().clone().requires_grad_()
    population_loss(DualDPO(alpha=alpha, beta=beta), logits, pi, pi_0, reward, torch.ones(X, Y, Y).double()).backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_with_alpha_1_it_is_dpo() -> None:
    batch = golden.batch_of(reference.make_case(), torch.float64)
    batch = batch.having(DPO().prepare(batch)[0])
    results = []
    for algo in (DPO(), DualDPO(alpha=1.0), ALGORITHMS["offline_dual_dpo"](alpha=1.0)):
        logp_NT = torch.tensor(reference.make_case()["logp_theta"], dtype=torch.float64, requires_grad=True)
        loss, _ = algo.loss(logp_NT, batch if isinstance(algo, DualDPO) else replace(batch, logp_old_NT=None))
        loss.backward()
        results.append((loss.detach(), logp_NT.grad))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


def test_offline_the_snapshot_is_the_policy_before_each_batch(tiny, tmp_path) -> None:
    """Of the stored batches: log π_t is π_0's at first, later that of the checkpoint of before; one for all epochs."""
    algo = {"name": "offline_dual_dpo", "epochs": 2}
    config = tree(tiny, write_pairs(tmp_path), tmp_path / "run", algo, lr=1e-2, warmup=0)
    config["data"]["eval"] = None
    config["run"]["checkpoints"] = 3
    run = dualign.train(config, quiet=True)
    first, second = run.batch(0).batch, run.batch(1).batch
    torch.testing.assert_close(first.logp_old_NT, first.logp_ref_NT, rtol=0, atol=1e-5)
    assert (second.logp_old_NT - second.logp_ref_NT).abs().max() > 1e-2
    config["model"]["name"] = str(run.folder / "checkpoints" / "000001")
    engine = Engine.load(dualign.config.build(config))
    torch.testing.assert_close(engine.score(engine.policy, run.batch(1).tokens), second.logp_old_NT, rtol=0, atol=1e-5)
