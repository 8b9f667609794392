"""The labels that are bought and shown before a run that asks a judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dualign
from dualign.common.errors import AbsentError
from fault_server import FaultServer
from runs_common import metrics, tree, write_prompts


def config_of(tiny: Path, folder: Path, server: FaultServer, **more: Any) -> dict[str, Any]:
    reward = {"type": "judge", "rubric": "helpfulness", "base_url": server.url, "model": "m", "retries": 0,
              "cache": str(folder / "c.sqlite")} | more  # fmt: skip
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"}, online_batches=1)
    config |= {"reward": [reward]}
    config["data"]["eval"] = None
    return config


def test_a_handful_is_shown_and_moves_nothing(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FaultServer() as server:
        shown = config_of(tiny, tmp_path, server)
        run = dualign.train(shown)
        told = capsys.readouterr().out
        calls = server.stats.calls
        silent = json.loads(json.dumps(shown))
        silent["run"] |= {"dir": str(tmp_path / "silent"), "preview": 0}
        other = dualign.train(silent)
        assert "the first 3 labels:" in told and told.count("    = ") == 3
        assert "first 3 labels" not in capsys.readouterr().out
        assert server.stats.calls == calls  # the batch's own labels were the same ones
    same = [{k: v for k, v in record.items() if "seconds" not in k} for record in metrics(run.folder)]
    assert same == [{k: v for k, v in record.items() if "seconds" not in k} for record in metrics(other.folder)]


def test_a_judge_that_labels_none_of_them_stops_the_run_there(tiny: Path, tmp_path: Path) -> None:
    with FaultServer(reply="I would rather not say.") as server:
        with pytest.raises(
            AbsentError, match=r"none of 3 completions got a label \(3 × .*Replies: “I would rather not"
        ):
            dualign.train(config_of(tiny, tmp_path, server), quiet=True)
        assert server.stats.calls == 3
