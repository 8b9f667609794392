"""A laboratory in small, end to end by the commands: the task's files, a run that looks at gold, a tested claim."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from command import dualign as command
from dualign.annotate.head import load_head
from dualign.eval.compare.cells import run_grid
from dualign.eval.compare.grid import load
from dualign.eval.compare.report import write_report
from dualign.run.folder import Run
from dualign.training.resume import resumed_config


@pytest.fixture(scope="module")
def lab(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lab") / "task"
    said = command("lab", folder, "--pairs", 100, "--noise", 0.3, "--demonstrations", 256)
    assert said.code == 0, said.text
    return folder


def here(cell, resume, stopping):
    import dualign

    dualign.train(resumed_config(cell.folder, ()) if resume else cell.config, resume=resume, quiet=True)


def test_the_command_makes_the_task_once(lab):
    head = load_head(str(lab / "proxy.safetensors"))
    assert head.about["encoder"] == "words"
    assert head.about["fits"][0]["pairs"] > 50 and head.about["held_out"]["pairs_heldout.jsonl"]["pairs"] > 250
    before = {p: p.stat().st_mtime_ns for p in lab.iterdir() if p.name != "task.yaml"}
    assert command("lab", lab, "--pairs", 100, "--noise", 0.3, "--demonstrations", 256).out.startswith("ready: ")
    assert {p: p.stat().st_mtime_ns for p in before} == before
    other = command("lab", lab, "--pairs", 200)
    assert other.code == 2 and "holds another task" in other.err


def test_systems_are_compared_by_gold_and_claims_answered(lab, tmp_path, monkeypatch):
    monkeypatch.setattr("dualign.eval.compare.plots.draw", lambda results, folder: [])
    size = {"train.online_batches": 2, "train.online_batch": 32, "train.update_size": 16, "eval.prompts": 32}
    keys = {
        "base": str(lab / "task.yaml"),
        "out": str(tmp_path / "out"),
        "measure": "gold",
        "seeds": [0, 1],
        "set": size | {"eval.every": 1},
        "systems": {"dar": {"axes": {"algo.alpha": [0.5, 0.0]}}, "grpo": {"algo": {"name": "grpo"}}},
        "claims": [
            {"says": "DAR first", "more": "dar, algo.alpha = 0.5", "than": "grpo"},
            {"says": "the proxy rises", "more": "dar, algo.alpha = 0.0", "of": "change", "reward": "proxy"},
        ],
    }
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(keys))
    grid = load(tmp_path / "grid.yaml")
    assert run_grid(grid, here, print) == {}
    write_report(grid, {})
    text = (tmp_path / "out" / "report" / "report.md").read_text()
    ends = {}
    for name in ("dar/algo.alpha=0.5", "grpo"):
        for seed in (0, 1):
            run = Run.open(tmp_path / "out" / name / f"seed{seed}")
            rows, result = run.read_evaluation(2)
            ends[name, seed] = sum(row.label.parts["gold"] for row in rows) / len(rows)
            assert result["rewards"]["gold"] == pytest.approx(ends[name, seed])
            assert all(row.label.value == row.label.parts["proxy"] for row in rows), "gold is looked at, not trained on"
            assert result["kl"] >= 0 and result["kl_ci"] < max(0.2, result["kl"])
            assert all("gold/mean" in record for record in run.metrics())
    mean = sum(ends["dar/algo.alpha=0.5", s] - ends["grpo", s] for s in (0, 1)) / 2
    assert f"| DAR first | 2 | {mean:+.3f}" in text and "| the proxy rises | 2 |" in text
    power = command("compare", tmp_path / "grid.yaml", "--power", 0.1)
    assert power.code == 0 and "32 prompts: " in power.out, power.text


def test_a_claim_about_no_system_is_refused(tmp_path):
    keys = {"base": "lab/task", "seeds": [0], "out": str(tmp_path), "systems": {"dar": {}}}
    keys["claims"] = [{"says": "?", "more": "dra"}]
    (tmp_path / "grid.yaml").write_text(json.dumps(keys))
    said = command("compare", tmp_path / "grid.yaml")
    assert said.code == 2 and "claims.0.more: no 'dra'" in said.err
