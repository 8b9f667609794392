"""What holds of every system: gradients, sums over micro-batches, padding, what it says it needs, K = 1."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import golden
from algos import reference
from dualign.algos import ALGORITHMS, Algorithm, Batch
from dualign.algos.advantages import best_and_worst
from dualign.algos.awr import RWR
from dualign.algos.dar import DAR
from dualign.algos.dpo import DPO
from dualign.algos.dual_ppo import DualPPO
from dualign.algos.grpo import GRPO
from dualign.algos.ipo import IPO
from dualign.algos.iter_sft import IterSFT
from dualign.algos.ppo import PPO
from dualign.algos.rloo import RLOO
from dualign.algos.slic import SLiC
from dualign.common.errors import UserError

KEYS = sorted(golden.SYSTEMS)
CASE = reference.make_case()


def ready(algo: Algorithm, batch: Batch, logp_NT: Tensor) -> Batch:
    with torch.no_grad():
        batch = batch.having(algo.prepare(batch)[0])
        return batch.having(algo.refresh(batch, logp_NT, None)) if algo.recompute else batch


def inputs() -> tuple[Batch, Tensor, Tensor]:
    batch = golden.batch_of(CASE, torch.float64)
    return batch, torch.tensor(CASE["logp_theta"]).double(), torch.tensor(CASE["value"]).double()


@pytest.mark.parametrize(
    "key", [k for k in KEYS if k not in ("dao", "dao_reinforce", "cispo")]
)  # these stop a gradient
def test_gradcheck(key: str) -> None:
    algo, (batch, logp_NT, value_NT) = golden.build(key, {}), inputs()
    batch = ready(algo, batch, logp_NT)

    def loss(logp_NT: Tensor, value_NT: Tensor) -> Tensor:
        return algo.loss(logp_NT, batch, value_NT)[0] / algo.denominator(batch)

    assert torch.autograd.gradcheck(loss, (logp_NT.requires_grad_(), value_NT.requires_grad_(algo.critic)))


@pytest.mark.parametrize("key", KEYS)
def test_micro_batches_add_up_and_padding_is_nothing(key: str) -> None:
    algo, (batch, logp_NT, value_NT) = golden.build(key, {}), inputs()
    batch = ready(algo, batch, logp_NT)
    whole, columns = algo.loss(logp_NT, batch, value_NT)
    noise = torch.randn_like(logp_NT) * (1 - batch.mask_NT)
    parts = []
    for rows in (torch.arange(4, 8), torch.arange(8, 12), torch.arange(0, 4)):  # prompts 1 and 2, 3, 0
        part, some = algo.loss((logp_NT + noise)[rows], batch.select(rows), (value_NT + noise)[rows])
        parts.append(part)
        assert all(torch.equal(some[name], column[rows]) for name, column in columns.items())
    torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("key", KEYS)
def test_order_of_rows_does_not_matter(key: str) -> None:
    algo, (batch, logp_NT, value_NT) = golden.build(key, {}), inputs()
    shuffled = torch.tensor([8, 9, 10, 11, 7, 4, 5, 6, 0, 1, 2, 3])
    one = ready(algo, batch, logp_NT)
    two = ready(algo, batch.select(shuffled), logp_NT[shuffled])
    a = algo.loss(logp_NT, one, value_NT)[0] / algo.denominator(one)
    b = algo.loss(logp_NT[shuffled], two, value_NT[shuffled])[0] / algo.denominator(two)
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


NEEDS = [golden.build(key, {}) for key in KEYS] + [
    ALGORITHMS[name].model_validate({"name": name, **settings})
    for name, settings in [
        ("dao", {"alpha": 0.0}),
        ("dao", {"alpha": 1.0}),
        ("dao", {"alpha": 1.0, "variant": "ppo"}),
        ("rloo", {"beta": 0.0}),
        ("grpo", {"beta": 0.0}),
        ("ppo", {"beta": 0.0}),
        ("dual_ppo", {"alpha": 0.0}),
        ("dual_ppo", {"beta": 0.0}),
        ("dar", {"alpha": 0.0, "kl_budget": 1.0}),
        ("dapo", {"beta": 0.1}),
        ("dual_dpo", {"alpha": 0.0}),
        ("dual_dpo", {"alpha": 1.0}),
        ("pmd", {"tau": 0.0}),
    ]
]


@pytest.mark.parametrize("algo", NEEDS, ids=lambda a: " ".join(map(str, a.model_dump().values())))
def test_needs_are_truthful(algo: Algorithm) -> None:
    """What is not needed may be absent; what is needed makes a difference."""
    batch, logp_NT, value_NT = inputs()

    def outcome(batch: Batch) -> Tensor:
        """Loss and gradient, in one tensor."""
        logp = logp_NT.clone().requires_grad_()
        loss, _ = algo.loss(logp, ready(algo, batch, logp.detach()), value_NT)
        loss.backward()
        assert logp.grad is not None
        return torch.cat([loss.detach()[None], logp.grad.flatten()])

    plain = outcome(batch)
    for needed, field in [(algo.needs_ref, "logp_ref_NT"), (algo.needs_old, "logp_old_NT")]:
        if needed:
            other = getattr(batch, field) - 0.1 * torch.arange(len(batch))[:, None] * batch.mask_NT
            assert not torch.allclose(outcome(dataclasses.replace(batch, **{field: other})), plain, rtol=1e-12)
        else:
            assert torch.equal(outcome(dataclasses.replace(batch, **{field: None})), plain)


def own_columns(algo: Algorithm, shift: float) -> dict[str, Tensor]:
    """What `prepare` makes of the first prompt's rows where log π_t of all others is moved by `shift` a token."""
    batch, *_ = inputs()
    own_N = batch.group_N == batch.group_N[0]
    assert batch.logp_old_NT is not None
    moved_NT = batch.logp_old_NT + shift * (~own_N)[:, None] * batch.mask_NT
    columns, _ = algo.prepare(dataclasses.replace(batch, logp_old_NT=moved_NT))
    return {name: column[own_N] for name, column in columns.items()}


@pytest.mark.parametrize(
    "algo", [a for a in NEEDS if a.by_prompt], ids=lambda a: " ".join(map(str, a.model_dump().values()))
)
def test_by_prompt_is_truthful(algo: Algorithm) -> None:
    """To the bit: log π_t of other prompts may not be known yet."""
    here, there = own_columns(algo, 0.0), own_columns(algo, -5.0)
    assert here and all(torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("algo", [PPO(), DAR(alpha=1.0, beta=1.0, w_clip=1e6, skip_below=0.01)], ids=lambda a: a.name)
def test_systems_that_look_at_all_prompts_say_so(algo: Algorithm) -> None:
    here, there = own_columns(algo, 0.0), own_columns(algo, -5.0)
    assert not algo.by_prompt and any(not torch.equal(here[name], there[name]) for name in here)


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_declarations(name: str) -> None:
    algo = ALGORITHMS[name]()
    assert algo.name == name
    assert type(algo).model_fields["name"].default == name
    for bad in ({"bta": 0.1}, {"epochs": 0}, {"epochs": "2"}):
        with pytest.raises(ValueError):
            ALGORITHMS[name].model_validate({"name": name, **bad})


COMPARING = {"dar", "dao", "awr", "rloo", "grpo", "dapo", "dr_grpo", "gspo", "cispo", "gvpo", "oapl", "pmd"} | {
    "dpo", "dual_dpo", "ipo", "slic", "offline_dpo", "offline_dual_dpo", "simpo",
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_one_completion_per_prompt_is_refused_where_it_cannot_serve(name: str) -> None:
    system = ALGORITHMS[name]
    system().check(2)
    if name not in COMPARING:
        return system().check(1)
    with pytest.raises(ValueError, match=r"rollout\.k: .* use k of 2 or more") as caught:
        system().check(1)
    if "baseline" in system.model_fields:
        assert "algo.baseline: batch" in str(caught.value)
        system.model_validate({"baseline": "batch"}).check(1)


def batch_of(reward: list[float], group: list[int], **more: Tensor) -> Batch:
    N = len(reward)
    logp = torch.full((N, 1), -1.0, dtype=torch.float64)
    fields = {"mask_NT": torch.ones_like(logp), "logp_old_NT": logp, "logp_ref_NT": logp} | more
    return Batch(group_N=torch.tensor(group), reward_N=torch.tensor(reward, dtype=torch.float64), **fields)


def test_best_and_worst_take_the_first_of_equals() -> None:
    best, worst = best_and_worst(torch.tensor([1.0, 7, 7, 1, 2, 5, 5]), torch.tensor([9, 9, 9, 9, 4, 3, 3]))
    assert best.nonzero()[:, 0].tolist() == [1, 4, 5]
    assert worst.nonzero()[:, 0].tolist() == [0, 4, 5]


def test_pairs_leave_out_groups_without_a_difference() -> None:
    batch = batch_of([1, 2, 3, 3, 8], [0, 0, 1, 1, 2])
    columns, stats = DPO().prepare(batch)
    assert columns["role"].tolist() == [-1, 1, 0, 0, 0]
    assert columns["keep"].tolist() == [True, True, False, False, False]
    assert stats == {"pairs": 1, "tied_groups": 2, "reward_gap": 1}
    batch = batch.having(columns)
    assert DPO().denominator(batch) == 1
    nothing = batch_of([3, 3], [0, 0])
    nothing = nothing.having(DPO().prepare(nothing)[0])
    assert DPO().denominator(nothing) == 1  # so that an update without a pair is 0, not 0/0
    assert DPO().loss(torch.zeros(2, 1).double(), nothing)[0] == 0


@pytest.mark.parametrize(
    ("labels", "pair"),
    [([1, 0, 1, 0], (0, 1)), ([0, 1, 1, 0], (1, 0)), ([0.5, 0.5, 0, 1], (3, 2)), ([0, 1, 0.5, 0.5], (1, 0))],
)
def test_preference_labels_choose_two_that_were_compared(labels: list[float], pair: tuple[int, int]) -> None:
    role = DPO().prepare(batch_of(labels, [0] * 4))[0]["role"]
    assert (role.argmax().item(), role.argmin().item()) == pair


def test_ipo_is_at_rest_where_h_is_its_target() -> None:
    """Eq. 17 of Azar et al.: h = 1/(2β)."""
    algo = IPO(beta=0.1)
    batch = batch_of([1, 0], [0, 0])
    batch = batch.having(algo.prepare(batch)[0])
    logp = torch.tensor([[4.0], [-1.0]], dtype=torch.float64, requires_grad=True)  # h = 5 = 1/(2 · 0.1)
    loss, _ = algo.loss(logp, batch)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-20) and logp.grad.abs().max() < 1e-9


def test_slic_stops_at_the_hinge() -> None:
    algo = SLiC(beta=0.5)
    batch = batch_of([1, 0, 1, 0], [0, 0, 1, 1])
    batch = batch.having(algo.prepare(batch)[0])
    logp = torch.tensor([[2.0], [-1.0], [1.0], [0.0]], dtype=torch.float64, requires_grad=True)  # h = 3 and 1; 1/β = 2
    loss, _ = algo.loss(logp, batch)
    loss.backward()
    assert loss == 0.5 and logp.grad.flatten().tolist() == [0, 0, -0.5, 0.5]


def test_alone_in_its_group_a_row_has_no_advantage() -> None:
    batch = batch_of([5, 1, 3], [0, 1, 1])
    assert RLOO().prepare(batch)[0]["advantage"].tolist() == [0, -2, 2]
    assert GRPO().prepare(batch)[0]["advantage"][0] == 0


def test_rloo_penalises_leaving_pi_0() -> None:
    old = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64)
    ref = torch.tensor([[-1.0], [-3.0]], dtype=torch.float64)  # the second is 2 nats more likely than under π_0
    A = RLOO(beta=0.5).prepare(batch_of([1, 1], [0, 0], logp_old_NT=old, logp_ref_NT=ref))[0]["advantage"]
    assert A.tolist() == [1, -1]


def test_iter_sft_counts_only_the_tokens_it_trains_on() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]], dtype=torch.float64)
    batch = batch_of([1, 2, 3], [0, 0, 1], mask_NT=mask, logp_old_NT=-mask, logp_ref_NT=-mask)
    batch = batch.having(IterSFT().prepare(batch)[0])
    assert batch["keep"].tolist() == [False, True, True]
    assert IterSFT().denominator(batch) == 3
    assert IterSFT.updates_per_batch == 1


def test_rwr_refuses_to_overflow() -> None:
    with pytest.raises(UserError, match=r"algo\.beta"):
        RWR(beta=0.01).prepare(batch_of([1, 10], [0, 0]))


def test_missing_eos_costs_reward_only_where_it_is_known() -> None:
    zeros = torch.zeros(2, 1, dtype=torch.float64)
    known = batch_of([1, 2], [0, 0], value_old_NT=zeros, missing_eos_N=torch.tensor([True, False]))
    assert PPO().prepare(known)[0]["returns"].tolist() == [[0], [2]]
    assert PPO(missing_eos_penalty=3).prepare(known)[0]["returns"].tolist() == [[-2], [2]]
    assert PPO().prepare(dataclasses.replace(known, missing_eos_N=None))[0]["returns"].tolist() == [[1], [2]]


def test_dual_ppo_starts_as_its_preparation_and_follows_the_policy() -> None:
    """At a batch's first update π_θ = π_t, so `refresh` gives what `prepare` gave; later it does not."""
    batch, logp_NT, _ = inputs()
    prepared = DualPPO().prepare(batch)[0]
    for name, column in DualPPO().refresh(batch, batch.logp_old_NT, None).items():
        assert torch.equal(column, prepared[name])
    assert not torch.allclose(DualPPO().refresh(batch, logp_NT, None)["advantage"], prepared["advantage"])
