"""Check every system against a file of golden values: `python tests/golden.py FILE...`.

A file holds one `case` (inputs; rows grouped by prompt) and `expect[key]` (loss, gradient with respect to log π_θ per
token, and what led there). One line per expectation; exit status 1 if any is wrong or has no system here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dualign.algos import ALGORITHMS, Algorithm, Batch

# expectation -> system and the arguments by which it differs from the system's defaults
SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in ALGORITHMS} | {
    "dar_rlhf": ("dar", {"alpha": 0.5, "beta": 0.5}),
    "dar_alpha0": ("dar", {"alpha": 0.0}),
    "dar_batch_baseline": ("dar", {"baseline": "batch"}),
    "dar_stale": ("dar", {}),
    "dar_trust": ("dar", {"epsilon": 0.5}),
    "grpo_batch": ("grpo", {"scale": "batch"}),
    "dao_reinforce": ("dao", {"variant": "reinforce"}),
    "dao_ppo": ("dao", {"variant": "ppo"}),
}
STALE = {"dar_stale"}  # expectations whose rows were sampled by `logp_behaviour`; else by π_t
Numbers = dict[str, Any]  # quantity -> number, list of numbers, or list of lists


def build(key: str, expected: Numbers) -> Algorithm:
    """The system of expectation `key`; hyper-parameters that the expectation names override all else."""
    name, arguments = SYSTEMS[key]
    system = ALGORITHMS[name]
    given = {k: v for k, v in expected.items() if k in system.model_fields}
    return system.model_validate({"name": name, **arguments, **given})


def batch_of(case: Numbers, dtype: torch.dtype, stale: bool = False) -> Batch:
    def column(key: str) -> torch.Tensor | None:
        return torch.tensor(case[key], dtype=dtype) if key in case else None

    mask_NT, reward_N = column("mask"), column("reward")
    assert mask_NT is not None and reward_N is not None
    return Batch(
        group_N=torch.tensor(case["group"])
        if "group" in case
        else torch.arange(case["P"]).repeat_interleave(case["K"]),
        mask_NT=mask_NT,
        reward_N=reward_N,
        logp_old_NT=column("logp_old"),
        logp_ref_NT=column("logp_ref"),
        value_old_NT=column("value_old"),
        logp_behaviour_NT=column("logp_behaviour") if stale else None,
        missing_eos_N=torch.tensor(case["missing_eos"], dtype=torch.bool) if "missing_eos" in case else None,
    )


def compute(algo: Algorithm, case: Numbers, dtype: torch.dtype, stale: bool = False) -> Numbers:
    """What `algo` makes of the case's one batch, as one update."""
    logp_NT = torch.tensor(case["logp_theta"], dtype=dtype, requires_grad=True)
    value_NT = torch.tensor(case["value"], dtype=dtype, requires_grad=True) if algo.critic else None
    batch = batch_of(case, dtype, stale)
    with torch.no_grad():
        columns, stats = algo.prepare(batch)
        batch = batch.having(columns)
        if algo.recompute:
            batch = batch.having(algo.refresh(batch, logp_NT, value_NT))
    denominator = algo.denominator(batch)
    # rows that are not kept never reach the loss
    rows = torch.nonzero(batch["keep"])[:, 0] if "keep" in batch.columns else torch.arange(len(batch))
    total, columns = algo.loss(logp_NT[rows], batch.select(rows), None if value_NT is None else value_NT[rows])
    (total / denominator).backward()
    assert logp_NT.grad is not None
    found: Numbers = {"loss": (total / denominator).item(), "grad_logp_theta": logp_NT.grad.tolist()}
    if value_NT is not None and value_NT.grad is not None:
        found["grad_value"] = value_NT.grad.tolist()
    if "value_loss" in columns:
        found["value_loss"] = ((columns["value_loss"] * batch.mask_NT.sum(-1)).sum() / batch.mask_NT.sum()).item()
    if "role" in batch.columns:
        found["chosen"] = torch.nonzero(batch["role"] > 0)[:, 0].tolist()
        found["rejected"] = torch.nonzero(batch["role"] < 0)[:, 0].tolist()
    elif "keep" in batch.columns:
        found["best"] = torch.nonzero(batch["keep"])[:, 0].tolist()
    if "beta_found" in stats:
        found["beta_found"] = stats["beta_found"]
    return found | {k: batch[k].tolist() for k in ("advantage", "weight", "returns") if k in batch.columns}


def differences(found: Numbers, expected: Numbers, hyper: set[str], dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(quantity, error) of everything expected; infinite where it was not computed or has another shape.

    float64: absolute, or relative for numbers above 1. float32: relative to the number or, where terms of that size
    cancelled, to a hundredth of the quantity's largest.
    """
    for quantity, value in expected.items():
        if quantity in hyper:
            continue
        want = torch.tensor(value, dtype=torch.float64)
        have = torch.tensor(found.get(quantity, []), dtype=torch.float64)
        if want.shape != have.shape:
            yield quantity, float("inf")
            continue
        size = want.abs()
        scale = size.clamp(min=1) if dtype == torch.float64 else torch.maximum(size, size.max() / 100).clamp(min=1e-30)
        error = ((have - want).abs() / scale).max() if want.numel() else torch.zeros(())
        yield quantity, float(error.nan_to_num(float("inf")))


TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def check(data: Numbers) -> Iterator[tuple[str, bool, str]]:
    """(expectation, right?, what to say) for each expectation of one file's contents."""
    for key, expected in data["expect"].items():
        if key not in SYSTEMS:
            yield key, False, "missing: no such system here"
            continue
        algo = build(key, expected)
        worst, wrong = {}, []
        for dtype, tolerance in TOLERANCE.items():
            found = compute(algo, data["case"], dtype, key in STALE)
            errors = dict(differences(found, expected, set(type(algo).model_fields), dtype))
            worst[dtype] = max(errors.values(), default=float("inf"))
            kind = str(dtype).removeprefix("torch.")
            wrong += [f"{quantity} off by {e:.2g} in {kind}" for quantity, e in errors.items() if not e <= tolerance]
        said = f"max error {worst[torch.float64]:.1e} in float64, {worst[torch.float32]:.1e} in float32"
        yield key, not wrong, f"wrong: {'; '.join(wrong)}" if wrong else f"ok     {said}"


def main(paths: list[str]) -> int:
    failures = 0
    for path in paths:
        for key, right, said in check(json.loads(Path(path).read_text(encoding="utf-8"))):
            print(f"{Path(path).name:14} {key:20} {said}")
            failures += not right
    return 1 if failures or not paths else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
