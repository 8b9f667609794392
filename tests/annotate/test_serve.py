"""`serve: MODEL`: a judge's server that a run, or a command, starts and ends (a fake vLLM; the real ones are in
test_real_server.py and tests/vllm)."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

import dualign
from command import dualign as command
from dualign.annotate.base import Item, label_all
from dualign.annotate.endpoints import JudgeReward, ServedReward
from dualign.annotate.judge import JudgeAnnotator
from dualign.annotate.serve import held
from dualign.annotate.served import ServedAnnotator
from dualign.common.errors import StopRun, UserError
from dualign.common.processes import Processes
from dualign.common.types import Prompt
from fake_vllm import interpreter
from runs_common import launch, tree, write_prompts


@pytest.fixture
def served(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings of a judge that serves the tiny model's folder by the fake."""
    monkeypatch.setenv("DUALIGN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "asked"))
    serve = {"model": str(tiny), "python": str(interpreter(tmp_path, "fake_judge"))}
    return {"rubric": "helpfulness", "cache": str(tmp_path / "labels.sqlite"), "concurrency": 4, "serve": serve}


def items(count: int) -> list[Item]:
    return [Item(i, i, Prompt(str(i), "How?"), f"quality-{1 + i % 10} {i}") for i in range(count)]


def started(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]


def asked(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "asked").read_text().splitlines()]


def gone(process: int, within: float = 30.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (OSError, IndexError):
            return True
        time.sleep(0.05)
    return False


def configured(tiny: Path, folder: Path, *rewards: dict[str, Any]) -> dict[str, Any]:
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"})
    config["data"]["eval"] = None
    return config | {"reward": [{"type": "judge", **reward} for reward in rewards]}


def test_two_rewards_share_one_server_that_ends_with_the_run(tiny, tmp_path, served, monkeypatch):
    secrets = {"OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_PASSWORD"}
    for name in secrets:
        monkeypatch.setenv(name, "sk-secret-1234567")
    served["serve"] |= {"devices": 3, "gpu_memory": 0.25, "args": ["--enforce-eager"]}
    run = dualign.train(configured(tiny, tmp_path, served, served | {"rubric": "harmlessness"}), quiet=True)
    assert run.summary is not None
    rows = [row for step in run.steps() for row in run.batch(step).rows]
    assert len(rows) == 48 and all(row.label.value is not None for row in rows)
    (log,) = run.folder.glob("server-*.log")
    (start,) = started(log)
    assert start["devices"] == "3" and start["argv"][-1] == "--enforce-eager"
    assert start["argv"][start["argv"].index("--gpu-memory-utilization") + 1] == "0.25"
    assert not secrets & set(start["names"])
    (process,) = {each["process"] for each in asked(tmp_path)}
    assert gone(process, 0.1) and {each["key"] for each in asked(tmp_path)} == {"Bearer none"}
    assert "sk-secret" not in "".join(p.read_text("utf-8", "replace") for p in run.folder.rglob("*") if p.is_file())
    assert command("verify", run.folder).code == 0


def test_labels_are_kept_under_the_models_content_wherever_it_is(tiny, tmp_path, served):
    """Neither a port nor a folder's name makes a label another one; other weights do."""

    def bought(model: Path) -> int:
        annotator = JudgeAnnotator(JudgeReward(**served | {"serve": served["serve"] | {"model": str(model)}}))
        assert [label.value for label in label_all(annotator, items(4))] == [1, 2, 3, 4]
        calls = annotator.client.spent().calls
        annotator.close()
        return calls

    one = shutil.copytree(tiny, tmp_path / "one" / "judge")
    two = shutil.copytree(tiny, tmp_path / "two" / "judge")
    assert [bought(one), bought(one), bought(two)] == [4, 0, 0]
    settings = json.loads((two / "config.json").read_text())
    (two / "config.json").write_text(json.dumps(settings | {"rope_theta": 12345.0}))
    assert [bought(two), bought(one)] == [4, 0]
    models = {row[0] for row in sqlite3.connect(served["cache"]).execute("SELECT model FROM reply")}
    assert len(models) == 2 and all(name.startswith("judge-") for name in models)
    assert not list((tmp_path / "cache" / "servers").glob("*.log"))  # nothing went wrong


def test_a_server_that_does_not_start_says_why(tiny, tmp_path, served):
    served["serve"]["args"] = ["--dies"]
    with pytest.raises(UserError, match=r"ended as it started \(exit code 1\)(.|\n)*OutOfMemoryError: no room"):
        dualign.train(configured(tiny, tmp_path, served), quiet=True)
    assert [path.suffix for path in (tmp_path / "run").iterdir()] == [".log"]
    served["serve"] |= {"args": ["--hangs"], "start_timeout": 1.0}
    with pytest.raises(UserError, match=r"did not start within 1 s(.|\n)*its log"):
        JudgeAnnotator(JudgeReward(**served))


def test_a_server_that_dies_stops_the_run_and_a_resume_starts_it_again(tiny, tmp_path, served, monkeypatch):
    monkeypatch.setenv("FAKE_DIES_ONCE", str(tmp_path / "died"))
    monkeypatch.setattr("dualign.annotate.request.FIRST_WAIT", 0.01)
    with pytest.raises(StopRun, match=r"ended \(exit code 1\)(.|\n)*illegal memory access\nResume"):
        dualign.train(configured(tiny, tmp_path, served), quiet=True)
    resumed = command("resume", tmp_path / "run", "reward.0.serve.gpu_memory=0.3")
    assert resumed.code == 0, resumed.text
    run = dualign.Run.open(tmp_path / "run")
    assert run.steps() == [0, 1, 2]
    (log,) = run.folder.glob("server-*.log")
    assert len(started(log)) == 2
    counts = Counter(each["process"] for each in asked(tmp_path))
    labels = sqlite3.connect(served["cache"]).execute("SELECT count(*) FROM reply").fetchone()[0]
    assert len(counts) == 2 and counts.total() == labels  # nothing was asked for twice


def test_other_weights_of_the_judge_are_found_on_resume(tiny, tmp_path, served):
    judge = shutil.copytree(tiny, tmp_path / "judge")
    served["serve"]["model"] = str(judge)
    dualign.train(configured(tiny, tmp_path, served), quiet=True)
    moved = judge.rename(tmp_path / "moved")
    more = ("train.online_batches=4", f"reward.0.serve.model={moved}", f"reward.0.model={moved}")
    assert command("resume", tmp_path / "run", *more).code == 0
    settings = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(settings | {"rope_theta": 12345.0}))
    said = command("resume", tmp_path / "run", "train.online_batches=5")
    assert said.code == 2 and "reward.0.model" in said.text


def test_what_is_killed_takes_its_server_along(tmp_path, served):
    script = (
        "import sys, time, json\nfrom dualign.annotate.endpoints import JudgeReward\n"
        "from dualign.annotate.judge import JudgeAnnotator\n"
        "judge = JudgeAnnotator(JudgeReward(**json.loads(sys.argv[1])))\n"
        "print(judge.client._server.child._process.pid, flush=True)\ntime.sleep(600)\n"
    )
    ours = subprocess.Popen([sys.executable, "-c", script, json.dumps(served)], stdout=subprocess.PIPE, text=True)
    process = int(ours.stdout.readline())
    assert not gone(process, 0.1)
    ours.kill()
    ours.communicate()
    assert gone(process)


def test_processes_of_a_machine_share_one_server(tmp_path, served, monkeypatch):
    """What two processes do, one after the other: the second learns from the first."""
    told: list[Any] = []

    def as_process(rank: int) -> tuple[str, bool]:
        def everyones(make: Any) -> list[Any]:
            told.extend(make())
            return told

        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.setattr("dualign.annotate.serve._running", {})
        processes = Processes(rank, 2)
        object.__setattr__(processes, "everyones", everyones)
        with held([settings], tmp_path, processes):
            judge = JudgeAnnotator(settings)
        kept.append(judge)
        return judge.client.settings.base_url, judge.client._server.child is not None

    kept: list[JudgeAnnotator] = []
    settings = JudgeReward(**served)
    (first, own), (second, not_own) = as_process(0), as_process(1)
    assert first == second and own and not not_own
    assert [label.value for label in label_all(kept[1], items(2))] == [1, 2]
    for judge in kept:
        judge.close()
    assert gone(asked(tmp_path)[0]["process"], 0.1)


@pytest.mark.slow
def test_a_run_of_two_processes(tiny, tmp_path, served):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(configured(tiny, tmp_path, served)))
    done = launch(recipe, processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = (tmp_path / "run").glob("server-*.log")
    assert len(started(log)) == len({each["process"] for each in asked(tmp_path)}) == 1
    assert gone(asked(tmp_path)[0]["process"], 5)


def test_a_reward_model_is_served_as_one(tmp_path, served):
    annotator = ServedAnnotator(ServedReward(**{k: v for k, v in served.items() if k != "rubric"}))
    assert [label.value for label in label_all(annotator, items(3))] == [1, 2, 3]
    (log,) = (tmp_path / "cache" / "servers").glob("*.log")
    assert "pooling" in started(log)[0]["argv"]
    annotator.close()


def test_commands_start_one(tmp_path, served):
    """`agreement` asks two annotators after another, of one server; `judge` writes what it said."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "How?", "chosen": "quality-9", "rejected": "quality-2"}\n' * 2)
    more = [f"--serve={json.dumps(served['serve'])}", "--rubric=helpfulness", f"--set=cache={served['cache']}"]
    said = command("judge", pairs, *more, f"--out={tmp_path / 'out.jsonl'}")
    assert said.code == 0, said.text
    assert [json.loads(row)["reward"] for row in (tmp_path / "out.jsonl").open()] == [9, 2, 9, 2]
    (tmp_path / "asked").unlink()
    assert command("agreement", pairs, *more, f"--set=cache={tmp_path / 'new.sqlite'}").code == 0
    assert len({each["process"] for each in asked(tmp_path)}) == 1
    with held([JudgeReward(**served)]):
        one, two = JudgeAnnotator(JudgeReward(**served)), JudgeAnnotator(JudgeReward(**served))
        assert one.client.settings.base_url == two.client.settings.base_url


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base_url": "http://localhost:1/v1"}, "not both"),
        ({"serve": None}, "needs base_url and model"),
        ({"serve": {"model": "x", "by": "transformers", "gpu_memory": 0.3}}, "gpu_memory is vllm's"),
        ({"serve": {"model": "x", "by": "transformers"}, "model": "y"}, "leave model out"),
        ({"serve": {"model": "x", "port": 1}}, "port"),
    ],
)
def test_wrong_settings_are_named(served, changes, words):
    with pytest.raises(ValueError, match=words):
        JudgeReward(**served | changes)


def test_the_plan_names_what_is_missing(tiny, tmp_path, served):
    served["serve"]["python"] = str(tmp_path / "nowhere")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(configured(tiny, tmp_path, served)))
    said = command("train", recipe, "--dry-run")
    assert said.code == 2 and "serve.python: no interpreter" in said.text
