"""Every system against golden values: the shared files, and our own from a second implementation."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

import golden
from algos import reference
from dualign.algos import ALGORITHMS
from shared import shared


@pytest.mark.parametrize("name", ["small.json", "medium.json", "beyond_small.json", "beyond_medium.json"])
def test_shared_golden_values(name: str) -> None:
    data = json.loads(shared(f"golden/{name}").read_text(encoding="utf-8"))
    results = list(golden.check(data))
    assert len(results) == len(data["expect"]) >= 11
    assert [f"{key}: {said}" for key, right, said in results if not right] == []


def test_stored_golden_values() -> None:
    """As the second implementation gave them once: both would have to drift alike."""
    data = json.loads(Path(golden.__file__).with_name("golden.json").read_text(encoding="utf-8"))
    assert {golden.SYSTEMS[key][0] for key in data["expect"]} == set(ALGORITHMS)
    assert [f"{key}: {said}" for key, right, said in golden.check(data) if not right] == []


@pytest.mark.parametrize("seed", range(3))
def test_own_golden_values(seed: int) -> None:
    """Unequal groups, a tied group, a row alone, cut-off rows: what the shared files do not have."""
    case = reference.make_case(seed)
    expect = reference.expectations(case)
    assert {golden.SYSTEMS[key][0] for key in expect} == set(ALGORITHMS)
    assert [said for _, right, said in golden.check({"case": case, "expect": expect}) if not right] == []


def test_the_checker_sees_errors(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    case = reference.make_case()
    expect = {key: reference.expectations(case)[key] for key in ("dar", "grpo", "dpo")}
    path = tmp_path / "own.json"

    def run(expect: dict) -> tuple[int, list[str]]:
        path.write_text(json.dumps({"case": case, "expect": expect}), encoding="utf-8")
        return golden.main([str(path)]), capsys.readouterr().out.splitlines()

    assert run(expect)[0] == 0
    for key, quantity in [("dar", "weight"), ("dpo", "chosen"), ("grpo", "grad_logp_theta")]:
        wrong = copy.deepcopy(expect)
        numbers = wrong[key][quantity]
        row = numbers[0] if isinstance(numbers[0], list) else numbers
        row[0] += 1e-6 if quantity != "chosen" else 1
        status, lines = run(wrong)
        assert status == 1
        assert [line.split()[1] for line in lines if f"wrong: {quantity} off by" in line] == [key]
    status, lines = run(expect | {"no_such_system": {"loss": 1.0}})
    assert status == 1 and "missing" in lines[-1]
    assert run({"dar": {"loss": float("nan")}})[0] == 1
    assert run({"dar": {"no_such_quantity": 1.0}})[0] == 1


def test_hyperparameters_in_the_expectation_override() -> None:
    algo = golden.build("dar_rlhf", {"alpha": 0.25, "loss": 1.0})
    assert (algo.alpha, algo.beta) == (0.25, 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype: torch.dtype) -> None:
    case = reference.make_case()
    batch = golden.batch_of(case, dtype)
    for key, (_, _) in golden.SYSTEMS.items():
        columns, stats = golden.build(key, {}).prepare(batch)
        assert all(c.dtype in (dtype, torch.bool) for c in columns.values()), key
        assert all(isinstance(s, float) and s == s for s in stats.values()), key
