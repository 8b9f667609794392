"""doctor, init and runs: what they say, and what they never do."""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import shutil
import threading
from pathlib import Path

import pytest
import typer.testing
import yaml

import dualign
from command import dualign as command
from dualign.cli import application
from dualign.cli import doctor as looks
from dualign.config import load
from dualign.run.shelf import running
from runs_common import reward_file, tree, write_prompts


@pytest.fixture(scope="module")
def made(tiny, tmp_path_factory) -> Path:
    """Two runs, the second of which is not finished, in folders of folders."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("one", "deep/two"):
        config = tree(tiny, write_prompts(folder), folder / name, {"name": "dar"}, online_batches=2)
        config["run"]["checkpoints"] = 2
        dualign.train(config | {"reward": [reward_file()]}, quiet=True)
    (folder / "deep/two/summary.json").unlink()
    return folder


@pytest.fixture
def shelf(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "runs"))


def test_runs_are_listed_for_people_and_programs(shelf):
    said = command("runs", shelf)
    assert said.code == 0 and "2 runs" in said.out and "finished" in said.out and "stopped" in said.out
    listed = json.loads(command("runs", shelf, "--json").out)
    assert {(Path(each["folder"]).name, each["state"], each["done"], each["batches"]) for each in listed} == {
        ("one", "finished", 2, 2), ("two", "stopped", 2, 2),
    }  # fmt: skip
    (shelf / "one/config.yaml").write_text("train: [")
    (shelf / "deep/two/metrics.jsonl").write_text("{broken\n")
    assert {each["state"] for each in json.loads(command("runs", shelf, "--json").out)} == {"unreadable"}
    assert command("runs", shelf / "none").code == 2


def test_a_look_at_runs_turns_no_run_away(shelf):
    turned_away, done = [], threading.Event()

    def begin_and_end() -> None:  # as one run after the other would
        while not done.is_set():
            with open(shelf / "one/.lock", "a") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    turned_away.append(True)

    runs = threading.Thread(target=begin_and_end)
    runs.start()
    try:
        seen = {running(shelf / "one") for _ in range(2000)}
    finally:
        done.set()
        runs.join()
    assert not turned_away and True in seen


def test_cleaning_shows_asks_and_leaves_what_is_not_the_runs(shelf):
    (shelf / "one/batches/notes.txt").write_text("mine")
    (shelf / "one/mine.log").write_text("mine")
    refused = command("runs", shelf, "--clean", "all")  # no terminal, no --yes
    assert refused.code == 2 and "--yes" in refused.err and (shelf / "one/config.yaml").exists()
    assert refused.out.count("not the run's") == 2
    assert command("runs", shelf, "--clean", "everything").code == 2
    with open(shelf / "deep/two/.lock", "a") as lock:  # as a process at work on it does
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert {e["state"] for e in json.loads(command("runs", shelf, "--json").out)} == {"finished", "running"}
        said = command("runs", shelf, "--clean", "all", "--yes")
    assert said.code == 0 and "a process is working on it" in said.out
    left = {p.relative_to(shelf / "one").as_posix() for p in (shelf / "one").rglob("*")}
    assert left == {"batches", "batches/notes.txt", "mine.log"}
    assert (shelf / "deep/two/batches/000000.parquet").exists()
    command("runs", shelf, "--clean", "all", "--yes")
    assert not (shelf / "deep/two").exists() and (shelf / "prompts.jsonl").exists()


def test_only_finished_runs_give_up_checkpoints_and_verify_afterwards(shelf):
    for what, left in (("state", {"000001", "000002"}), ("checkpoints", {"000002"})):
        said = command("runs", shelf, "--clean", what, "--yes")
        assert said.code == 0 and "not finished" in said.out
        assert {p.name for p in (shelf / "one/checkpoints").iterdir()} == left
        assert not list((shelf / "one").rglob("train.safetensors"))
        assert command("verify", shelf / "one").code == 0
    assert len(list((shelf / "deep/two/checkpoints").iterdir())) == 2
    assert command("export", shelf / "one", "--out", shelf / "m").code == 0


def test_a_folder_that_only_looks_like_a_run_keeps_everything(tmp_path):
    for name in ("config.yaml", "run.json", "eval/results.csv", "notes.log"):
        (tmp_path / "other" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "other" / name).write_text("{}")
    for what in ("all", "checkpoints"):
        said = command("runs", tmp_path, "--clean", what, "--yes")
        assert said.code == 0 and "no run of dualign's" in said.out
    assert len(list((tmp_path / "other").rglob("*"))) == 5


def test_what_another_run_is_made_from_stays_while_that_does(shelf):
    (shelf / "deep/two/summary.json").write_text("{}")
    config = shelf / "deep/two/config.yaml"
    tree = yaml.safe_load(config.read_text())
    tree["model"]["name"] = str(shelf / "one/checkpoints/000001")
    config.write_text(yaml.safe_dump(tree))
    command("runs", shelf, "--clean", "checkpoints", "--yes")
    assert {p.name for p in (shelf / "one/checkpoints").iterdir()} == {"000001", "000002"}
    assert {p.name for p in (shelf / "deep/two/checkpoints").iterdir()} == {"000002"}
    shutil.move(shelf / "deep/two", shelf / "two")
    said = command("runs", shelf / "one", "--clean", "all", "--yes")  # it is seen beside what was named
    assert said.code == 0 and f"stays: {shelf / 'one'}: {shelf.resolve() / 'two'} is made from it" in said.out
    command("runs", shelf, "--clean", "all", "--yes")
    assert not (shelf / "one").exists() and not (shelf / "two").exists()


@pytest.fixture
def roomy(tiny, tmp_path):
    """A model whose context holds the answers that `init` asks for."""
    folder = shutil.copytree(tiny, tmp_path / "roomy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    return folder


def test_init_writes_a_recipe_that_runs(roomy, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ("--model", roomy, "--prompts", prompts, "--held-out", prompts)
    ways = {"function": reward_file()["path"], "head": "helpful", "judge": "http://localhost:1/v1 org/judge: 1"}
    for kind, at in ways.items():
        for system in ("dar", "grpo"):
            out = tmp_path / f"{kind}-{system}.yaml"
            said = command("init", *options, "--reward", kind, "--at", at, "--system", system, "--out", out)
            assert said.code == 0 and f"next: dualign train {out}" in said.out, said.text
            config = load(out)
            assert config.algo.name == system and config.reward[0].type == kind and config.data.eval == str(prompts)
            assert out.read_text().count(" # ") > 12
    assert load(tmp_path / "judge-dar.yaml").reward[0].model == "org/judge: 1"
    again = command("init", *options, "--reward", "head", "--at", "hh", "--out", tmp_path / "head-dar.yaml")
    assert again.code == 2 and "already there" in again.err
    for lacking, said in (((), "--prompts is missing"), (("--prompts", "p"), "--at is missing"),
                          (("--prompts", "p", "--reward", "joy", "--at", "x"), "one of judge, function")):  # fmt: skip
        refused = command("init", *lacking, "--out", tmp_path / "n.yaml")
        assert refused.code == 2 and said in refused.err and not (tmp_path / "n.yaml").exists()


def test_init_asks_five_questions_at_a_terminal(roomy, tmp_path, monkeypatch):
    prompts = write_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dualign.cli.runs.at_terminal", lambda: True)
    typed = f"{roomy}\n{prompts}\n\nfunction\n{reward_file()['path']}\n"
    said = typer.testing.CliRunner().invoke(application(), ["init"], input=typed, catch_exceptions=False)
    assert said.exit_code == 0 and "FILE.py:NAME" in said.stdout
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["reward"][0]["path"] == reward_file()["path"]


@contextlib.contextmanager
def models_server(key):
    """A judge's server as far as a list of its models."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            allowed = self.headers["Authorization"] == f"Bearer {key}" and self.path == "/v1/models"
            data = json.dumps({"object": "list", "data": [{"id": "m", "object": "model"}]} if allowed else {}).encode()
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_doctor_finds_a_judge_that_is_down_a_key_that_is_wrong_and_no_fault(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-planted-0000")
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"})
    recipe = tmp_path / "r.yaml"

    def asked(url, model="m", **more):
        judge = {"type": "judge", "rubric": "helpfulness", "base_url": url, "model": model, "api_key_env": "JUDGE_KEY"}
        recipe.write_text(yaml.safe_dump(config | {"reward": [judge | more]}))
        said = command("doctor", recipe, "--json")
        assert "sk-planted" not in said.text
        found = json.loads(said.out)
        assert said.code == (1 if found["faults"] else 0)
        return {each["about"]: each for each in found["findings"]}["reward.0"]

    with models_server("sk-planted-0000") as url:
        assert asked(url)["state"] == "good"
        assert "no such model there" in asked(url, model="other")["found"]
        monkeypatch.setenv("JUDGE_KEY", "sk-planted-wrong")
        assert "does not take the key" in asked(url)["found"]
        monkeypatch.delenv("JUDGE_KEY")
        assert "wants a key" in asked(url)["found"]
    down = asked(url)
    assert down["state"] == "fault" and "does not answer" in down["found"] and down["do"]
    recipe.write_text(yaml.safe_dump(config | {"reward": [reward_file("no_such")]}))
    assert command("doctor", recipe).code == 1
    recipe.write_text(yaml.safe_dump(config | {"reward": [reward_file()]}))
    well = command("doctor", recipe)
    assert "nothing to fix" in well.err or "FAULT" in well.out
    recipe.write_text("train: {learning_rate: 1}")
    assert "train.lr here" in command("doctor", recipe).out


def test_doctor_names_a_package_that_is_too_old(monkeypatch):
    monkeypatch.setattr(looks.metadata, "requires", lambda name: ["numpy>=99", "no-such-thing>=1", "rich>=1"])
    found = [each for each in looks._packages() if each.state == "fault"]
    assert [each.found for each in found] == [f"numpy {looks.metadata.version('numpy')} is there, >=99 is needed",
                                              "no-such-thing is not installed"]  # fmt: skip


def test_results_are_one_document_for_programs(made):
    judge = reward_file()["path"]
    for before, after in ((["--json"], []), ([], ["--json"]), ([], [])):
        said = command("eval", *before, "reward", made / "one", "--judge", judge, *after)
        assert said.code == 0, said.err
        if before or after:
            assert json.loads(said.out)["systems"][0]["points"]
    assert not said.out.startswith("{")  # the flag is of one command
    assert json.loads(command("verify", made / "one", "--json").out) == []
    said = command("replay", made / "one", "--json")
    assert [(each["batch"], each["verdict"]) for each in json.loads(said.out)] == [(0, "identical"), (1, "identical")]
