"""DAR's corners: K = 1, σ = 0, ties, overflow, the clip of the product, baselines, v1's pair, left-out rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dualign.algos import Batch
from dualign.algos.advantages import advantages, normalise
from dualign.algos.dar import DAR


def batch_of(
    reward: list[float], group: list[int], log_ratio: list[float] | None = None, dtype: torch.dtype = torch.float64
) -> Batch:
    """One-token completions with log π_0 - log π_t = `log_ratio`."""
    old_NT = torch.full((len(reward), 1), -1.0, dtype=dtype)
    return Batch(
        group_N=torch.tensor(group),
        mask_NT=torch.ones_like(old_NT),
        reward_N=torch.tensor(reward, dtype=dtype),
        logp_old_NT=old_NT,
        logp_ref_NT=old_NT + torch.tensor(log_ratio or [0.0] * len(reward), dtype=dtype)[:, None],
    )


def test_v1_pair_is_converted() -> None:
    """ICLR's (0.1, 0.05), read as v1's, is mixture 0.67 and temperature 0.15."""
    algo = DAR.from_v1(0.1, 0.05)
    assert (algo.alpha, algo.beta) == (pytest.approx(2 / 3), pytest.approx(0.15))
    algo = DAR.from_v1(0.005, 0.045, w_clip=10.0)
    assert (algo.alpha, algo.beta, algo.w_clip) == (pytest.approx(0.1), pytest.approx(0.05), 10)


def test_defaults_are_the_papers() -> None:
    assert DAR().model_dump() == {
        "name": "dar", "epochs": 1, "tie": 0.0, "alpha": 0.1, "beta": 0.05, "w_clip": 20.0, "baseline": "group",
        "skip_below": 0.0,
        "epsilon": None, "kl_budget": None, "alpha_rate": 0.1, "alpha_lowest": 0.01,
    }  # fmt: skip


@pytest.mark.parametrize(
    "bad", [{"alpha": 1.1}, {"beta": 0.0}, {"w_clip": 0.0}, {"skip_below": 1.0}, {"baseline": "x"}]
)
def test_impossible_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError):
        DAR(**bad)


def test_baselines() -> None:
    reward, group = torch.tensor([1.0, 3, 5, 11]), torch.tensor([0, 0, 1, 1])
    assert advantages(reward, group, "group").tolist() == [-1, 1, -3, 3]
    assert advantages(reward, group, "batch").tolist() == [-4, -2, 0, 6]
    assert advantages(reward, group, "none").tolist() == [1, 3, 5, 11]


def test_groups_may_be_unequal_and_apart() -> None:
    assert advantages(torch.tensor([1.0, 10, 3, 20, 5]), torch.tensor([7, 2, 7, 2, 7]), "group").tolist() == [
        -2, -5, 0, 5, 2,
    ]  # fmt: skip


def test_one_completion_per_prompt() -> None:
    """Against the group every A is 0; against the batch DAR is reward-weighted."""
    batch = batch_of([1, 2, 6], [0, 1, 2])
    columns, stats = DAR(alpha=0.0).prepare(batch)
    assert columns["weight"].tolist() == [1, 1, 1] and stats["sigma_advantage"] == 0 and stats["tied"] == 0
    weight = DAR(alpha=0.0, beta=1.0, baseline="batch").prepare(batch)[0]["weight"]
    sigma = math.sqrt((4 + 1 + 9) / 2)
    assert weight.tolist() == pytest.approx([math.exp(a / (sigma + 1e-8)) for a in (-2, -1, 3)], rel=1e-14)


def test_a_single_row_has_advantage_zero() -> None:
    columns, _ = DAR().prepare(batch_of([4], [0], [0.5]))
    assert columns["advantage"].tolist() == [0] and columns["weight"].item() == pytest.approx(math.exp(0.05))


def test_tied_groups_still_train_towards_pi_0() -> None:
    """A tied group has A = 0 and w = (π_0/π_t)^α; here μ_A = 0 as well."""
    columns, stats = DAR(alpha=0.5).prepare(batch_of([1, 3, 2, 2], [0, 0, 1, 1], [0, 0, 0.8, -0.6]))
    assert columns["weight"][2:].tolist() == pytest.approx([math.exp(0.4), math.exp(-0.3)], rel=1e-14)
    assert stats["tied"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_a_mean_is_no_signal(dtype: torch.dtype) -> None:
    """Every group tied, at levels and sizes whose means round: all weights 1, not exp(noise/β)."""
    reward = [0.1] * 3 + [0.7] * 7 + [7.3] * 6 + [1e5 + 0.1] * 3
    group = [0] * 3 + [1] * 7 + [2] * 6 + [3] * 3
    columns, stats = DAR().prepare(batch_of(reward, group, dtype=dtype))
    assert columns["advantage"].tolist() == [0] * 19 and columns["weight"].tolist() == [1] * 19
    assert stats["sigma_advantage"] == 0 and stats["tied"] == 1
    for baseline in ("batch", "none"):
        columns, _ = DAR(baseline=baseline).prepare(batch_of([0.1] * 11, [0] * 11, dtype=dtype))
        assert columns["weight"].tolist() == [1] * 11


def test_small_differences_are_signal() -> None:
    A, sigma = normalise(advantages(torch.tensor([5.0, 5.00001]).double(), torch.tensor([0, 0]), "group"))
    assert sigma > 0 and A.tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5], rel=2e-3)


def test_nothing_overflows_in_float32() -> None:
    """β = 0.01 and one outlier of 512: A_norm/β > 2000, whose exp is infinite even in float64."""
    reward = [0.0] * 511 + [1.0]
    batch = batch_of(reward, [0] * 512, [0.0] * 512, torch.float32)
    columns, stats = DAR(beta=0.01).prepare(batch)
    assert columns["log_w_adv"].max() > 2000
    assert columns["weight"].isfinite().all() and columns["weight"].max().item() == pytest.approx(20, rel=1e-6)
    assert all(math.isfinite(s) for s in stats.values()) and stats["clip_rate"] == pytest.approx(1 / 512)


def test_the_product_is_clipped_not_the_factors() -> None:
    """w_reg = e^-50 and w_adv = e^30: clipping w_adv alone would leave 20 e^-50, as would clipping each."""
    A = 0.5**0.5
    algo = DAR(alpha=1.0, beta=A / 30)
    columns, _ = algo.prepare(batch_of([0, 1], [0, 0], [0.0, -29.0]))
    assert columns["weight"][1].item() == pytest.approx(math.exp(1), rel=1e-6) and not columns["clipped"][1]
    columns, _ = algo.prepare(batch_of([0, 1], [0, 0], [0.0, -26.0]))
    assert columns["weight"][1].item() == pytest.approx(20, rel=1e-12) and columns["clipped"][1]


def test_weights_that_all_vanish_leave_finite_statistics() -> None:
    columns, stats = DAR(alpha=1.0).prepare(batch_of([1, 1], [0, 0], [-2000.0, -3000.0]))
    assert columns["weight"].tolist() == [0, 0] and all(math.isfinite(s) for s in stats.values())


def test_left_out_rows_still_count_in_the_mean() -> None:
    batch = batch_of([0, 1, 2, 3], [0, 0, 0, 0])
    full, skipping = DAR(beta=0.3), DAR(beta=0.3, skip_below=0.1)
    all_rows, some_rows = batch.having(full.prepare(batch)[0]), batch.having(skipping.prepare(batch)[0])
    assert all_rows["keep"].all() and 0 < some_rows["keep"].sum() < 4
    assert torch.equal(some_rows["weight"], all_rows["weight"])
    assert skipping.denominator(some_rows) == full.denominator(all_rows) == 4
    logp = -torch.ones(4, 1).double()
    kept = some_rows.select(some_rows["keep"].nonzero()[:, 0])
    gap = full.loss(logp, all_rows)[0] - skipping.loss(logp[: len(kept)], kept)[0]
    dropped = skipping.prepare(batch)[1]["dropped_weight"]
    assert gap.item() / all_rows["weight"].sum().item() == pytest.approx(dropped, rel=1e-12)
    assert 0 < dropped < 0.1


def test_weights_are_constants() -> None:
    batch = batch_of([0, 1], [0, 0], [0.1, 0.2])
    batch.logp_ref_NT.requires_grad_()
    with torch.no_grad():
        columns, _ = DAR().prepare(batch)
    logp = torch.full((2, 1), -2.0, dtype=torch.float64, requires_grad=True)
    DAR().loss(logp, batch.having(columns))[0].backward()
    assert batch.logp_ref_NT.grad is None
    assert torch.equal(logp.grad[:, 0], -columns["weight"])


@settings(deadline=None)
@given(
    st.lists(st.integers(1, 10), min_size=2, max_size=24),
    st.floats(-3, 3),
    st.floats(0.1, 10),
)
def test_weights_do_not_depend_on_the_rewards_scale_or_origin(reward: list[int], shift: float, scale: float) -> None:
    group = [i // 4 for i in range(len(reward))]
    plain = DAR(beta=0.5).prepare(batch_of([float(r) for r in reward], group))[0]["weight"]
    moved = DAR(beta=0.5).prepare(batch_of([scale * r + shift for r in reward], group))[0]["weight"]
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=0)
    assert (plain <= 20.000001).all()
