"""docs/runs.md says what every key of metrics.jsonl, every column of a batch and every key of run.json is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import dualign
from runs_common import reward_file, tree, write_pairs, write_prompts

PAGE = (Path(__file__).parents[1] / "docs" / "runs.md").read_text(encoding="utf-8")
NAMED = set(re.findall(r"`([^`\n]+)`", PAGE))
REWARDS = [reward_file() | {"name": "a"}, reward_file("whitened") | {"name": "b", "weight": 0.5}]
SYSTEMS = {
    "dar": {"beta": 0.1, "kl_budget": 1.0}, "ppo": {}, "dpo": {}, "grpo": {}, "gvpo": {}, "oapl": {}, "offline_dpo": {},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(SYSTEMS))
def run(request, tiny, tmp_path_factory):
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    offline = name == "offline_dpo"
    data = (write_pairs if offline else write_prompts)(folder)
    config = tree(tiny, data, folder / "run", {"name": name} | SYSTEMS[name], online_batches=2)
    config["reward"] = [] if offline else REWARDS
    if name == "dar":
        config["train"]["reuse"] = [1]
        config["rollout"]["missing_eos_penalty"] = 0.5
        config["witness"] = {"reward": [reward_file()], "every": 1, "sample": 8}
    return dualign.train(config, quiet=True)


def test_every_number_of_a_batch_is_explained(run):
    keys = {key for record in run.metrics() for key in record}
    keys |= {phase for record in run.metrics() for phase in record["seconds"]}
    told = {f"NAME/{key.split('/')[1]}" if key.startswith(("a/", "b/")) else key for key in keys}
    assert told <= NAMED, sorted(told - NAMED)


def test_every_column_and_key_is_explained(run):
    for file in (run.folder / "batches").glob("*.parquet"):
        assert set(pq.read_schema(file).names) <= NAMED, sorted(set(pq.read_schema(file).names) - NAMED)
    for file in (run.folder / "evaluations").glob("*.parquet"):
        assert set(pq.read_schema(file).names) <= NAMED, sorted(set(pq.read_schema(file).names) - NAMED)
    assert set(run.about) <= NAMED, sorted(set(run.about) - NAMED)
    assert set(json.loads((run.folder / "summary.json").read_text())) <= NAMED, sorted(
        set(json.loads((run.folder / "summary.json").read_text())) - NAMED
    )
