"""The server tells what the folders hold, whatever state they are in; it writes nothing, and gives strangers nothing."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from command import dualign
from dualign.annotate.budget import SCHEMA
from dualign.common.errors import UserError
from dualign.common.intervals import half_width
from dualign.eval.view import serve
from dualign.eval.view.folders import Folders
from dualign.eval.view.server import HEADERS
from serving import Served, serving
from view_runs import LONG, MARKUP, record, write_batch, write_run

ODD = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "finished", finished=True, beta=0.1)
    write_run(folder / "sweep" / "stopped", beta=0.5)
    write_run(folder / ODD, k=2)
    write_batch(folder / "sweep" / "stopped" / "batches" / "000002.parquet", 2, [MARKUP, LONG, "short", "words"] * 2, 4)
    return folder


@pytest.fixture(scope="module")
def served(root):
    with serving(root) as found:
        yield found


def by_name(served, name):
    return next(run for run in served.api("runs")["runs"] if run["name"] == name)


# --- runs ---


def test_the_table_holds_every_run_with_its_state_and_the_settings_that_differ(served, root):
    told = served.api("runs")
    assert [run["name"] for run in told["runs"]] == [ODD, "finished", "sweep/stopped"]
    assert told["differing"] == ["algo.beta"]
    assert by_name(served, "finished")["state"]["is"] == "finished"
    stopped = by_name(served, "sweep/stopped")
    assert stopped["state"]["is"] == "stopped" and (stopped["done"], stopped["total"]) == (3, 4)
    assert stopped["settings"] == {"algo.beta": 0.5} and stopped["last"]["reward"] == 0.2
    assert served.get("/api/runs", have=told["version"]).status == 204
    with open(root / "sweep" / "stopped" / ".lock", "a") as lock:  # as a trainer holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert by_name(served, "sweep/stopped")["state"]["is"] == "running"
    assert by_name(served, "sweep/stopped")["state"]["is"] == "stopped"


def test_a_look_at_a_run_does_not_keep_a_trainer_from_it(served, root):
    before = served.api("runs")
    with open(root / "finished" / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert before["runs"]


def test_a_run_of_its_own_is_shown_by_its_name(root):
    assert list(Folders(root / "finished").runs()) == ["finished"]


def test_numbers_move_while_a_run_grows(tmp_path):
    run = write_run(tmp_path / "live", steps=2, total=9)
    with serving(tmp_path) as served:
        first = served.api("runs")
        assert served.api("curves", run="live")["curves"]["reward"] == [[0, 1], [0, 0.1]]
        with open(run / "metrics.jsonl", "a") as file:
            file.write(json.dumps(record(2)) + "\n" + json.dumps(record(3))[:20])  # the last one is being written
        curves = served.api("curves", run="live")
        assert curves["curves"]["reward"] == [[0, 1, 2], [0, 0.1, 0.2]] and curves["damaged"] == []
        assert curves["before"]["labels"] == [0, 8, 16] and curves["total"]["labels"] == 24
        assert curves["before"]["hours"] == pytest.approx([0, 3 / 3600, 6 / 3600], abs=1e-5)
        assert by_name(served, "live")["done"] == 3 and served.api("runs")["version"] != first["version"]
        write_batch(run / "batches" / "000002.parquet", 2, ["new one"] * 8, 4)
        assert served.api("list", run="live", q='"new one"')["completions"] == 8


def test_one_run_in_full(served):
    run = served.api("run", run="finished")
    assert run["settings"]["algo.beta"] == 0.1 and run["evaluations"] == [0, 3] and run["batches"] == [0, 1, 2]
    assert [e["reward"] for e in run["heldout"]] == [0.0, 0.3] and run["summary"]["gain"] == 0.5
    more = served.api("more")
    assert more["finished"]["spark"] == [0.0, 0.1, 0.2] and more["finished"]["held"] == []  # its row has them
    assert [e["reward"] for e in by_name(served, "finished")["held"]] == [0.0, 0.5]
    assert [e["reward"] for e in more["sweep/stopped"]["held"]] == [0.0, 0.3]
    assert by_name(served, "sweep/stopped")["evaluated"] == 3


def test_each_held_out_reward_has_its_mean_over_prompts_and_an_interval(tmp_path):
    path = write_run(tmp_path / "two") / "evaluations" / "000003.parquet"
    write_batch(path.with_stem("000000"), 0, ["one"], 1, {"reward": 0.0})
    table = write_batch(path, 3, ["an answer"] * 12, 2, {"reward": 0.3, "rewards": {"helpful": 0.1, "gold": 0.7}})
    means = [sum(pair) / len(pair) for pair in pairs_of(table, "helpful") if pair]
    with serving(tmp_path) as served:
        first, last = served.api("run", run="two")["heldout"]
    assert "helpful/mean" not in first  # one reward alone
    assert last["helpful/mean"] == 0.1 and last["helpful/mean_ci"] == pytest.approx(half_width(means))
    assert last["gold/mean"] == 0.7 and last["gold/mean_ci"] is None  # no answer has it: nothing to go by


def pairs_of(table, name):
    """Of each prompt's two answers the values of one reward that are there."""
    values = [json.loads(parts)[name] for parts in table["parts"].to_pylist()]
    return [[v for v in values[i : i + 2] if v is not None] for i in range(0, len(values), 2)]


def test_a_finished_run_that_is_made_longer_runs(tmp_path):
    run = write_run(tmp_path / "longer", finished=True)
    with serving(tmp_path) as served, open(run / ".lock", "a") as lock:
        assert by_name(served, "longer")["state"]["is"] == "finished"
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert by_name(served, "longer")["state"]["is"] == "running"


def test_a_configuration_is_read_as_a_whole_however_it_is_written(tmp_path):
    tree = {
        "algo": {"name": "dar", "beta": 0.5},
        "reward": [{"path": "a\nb: c", "weight": 0.25}],
        "run": {"dir": None},
    }
    texts = {
        "ours": yaml.safe_dump(tree), "json": json.dumps(tree), "document": "---\n" + yaml.safe_dump(tree),
        "anchors": "a: &a {b: 1}\nc: *a\n", "wrapped": "a: {b: 1,\nc: 2}\n", "damaged": "a: {b: 1\n",
    }  # fmt: skip
    for name, text in texts.items():
        (write_run(tmp_path / name) / "config.yaml").write_text(text)
    with serving(tmp_path) as served:
        told = {name: served.api("run", run=name) for name in texts}
    expected = {
        "algo.name": "dar",
        "algo.beta": 0.5,
        "reward.0.path": "a\nb: c",
        "reward.0.weight": 0.25,
        "run.dir": None,
    }
    assert all(told[name]["settings"] == expected for name in ("ours", "json", "document"))
    assert told["anchors"]["settings"] == {"a.b": 1, "c.b": 1} and told["wrapped"]["settings"] == {"a.b": 1, "a.c": 2}
    assert told["damaged"]["settings"] == {} and "config.yaml" in told["damaged"]["troubles"][0]


def test_no_number_of_points_is_too_few(served):
    assert served.get("/api/curves?run=finished&points=0").status == 200


# --- damage ---


def test_what_is_damaged_is_said_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "hurt")
    (run / "config.yaml").write_text("algo: {name: dar\n  beta: [")
    (run / "run.json").write_bytes(b"\xff\xfe{")
    (run / "summary.json").write_text("[1")
    (run / "spent.sqlite").write_bytes(b"no database" * 100)
    (run / "metrics.jsonl").write_text(json.dumps(record(0)) + "\n{broken\n[1]\n" + json.dumps(record(1)) + "\n")
    (run / "batches" / "000001.parquet").write_bytes(b"PAR1 not really PAR1")
    (run / "evaluations" / "000003.parquet").write_bytes(b"")
    (run / "witness").mkdir()
    (run / "witness" / "batch-000000.json").write_text('{"kind": "batch"}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.yaml").write_text("")
    (tmp_path / "empty" / "run.json").write_text("{}")
    with serving(tmp_path) as served:
        assert {r["name"] for r in served.api("runs")["runs"]} == {"hurt", "empty"}
        assert len(by_name(served, "hurt")["troubles"]) >= 4
        told = served.api("run", run="hurt")
        for name in ("config.yaml", "run.json", "summary.json", "spent.sqlite", "evaluations/000003", "witness/batch"):
            assert any(name in trouble for trouble in told["troubles"]), name
        curves = served.api("curves", run="hurt")
        assert curves["curves"]["reward"][1] == [0, 0.1] and curves["damaged"] == [2, 3]
        found = served.api("list", run="hurt")
        assert found["total"] == 4 and any("000001.parquet" in trouble for trouble in found["troubles"])
        for asked in ({"path": "/api/prompt"}, {"path": "/api/text", "kind": "batches"}):
            told = served.get(**asked, run="hurt", step=1, row=0)
            assert told.status == 500
            assert told.json["error"].startswith("damaged or half-written: batches/000001.parquet: ")
        assert served.api("list", run="empty")["total"] == 0 and served.api("curves", run="empty")["curves"] == {}


def test_aliases_that_grow_without_end_do_not(tmp_path):
    run = write_run(tmp_path / "bomb")
    lines = ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30))]
    (run / "config.yaml").write_text("\n".join(lines))
    with serving(tmp_path) as served:
        assert served.api("runs")["runs"][0]["name"] == "bomb"


# --- nothing is written ---


def snapshot(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(folder.rglob("*"))}


def test_nothing_is_written_into_a_run(tmp_path):
    run = write_run(tmp_path / "paid")
    bank = sqlite3.connect(run / "spent.sqlite")
    bank.execute("PRAGMA journal_mode=WAL")
    bank.executescript(SCHEMA + ";")
    bank.execute("INSERT INTO account (name, calls, picodollars) VALUES ('judge', 3, 2500000000000)")
    bank.commit()
    os.unlink(run / "spent.sqlite-shm")  # as after a kill: who opens the file in place would make it again
    before = snapshot(tmp_path)
    with serving(tmp_path) as served:
        assert by_name(served, "paid")["money"][0]["dollars"] == 2.5
        for name, more in (("run", {}), ("curves", {}), ("list", {"q": "apples"}), ("more", {})):
            served.api(name, run="paid", **more)
    assert snapshot(tmp_path) == before
    bank.close()


# --- strangers ---


@pytest.mark.parametrize("name", ["..", "../secret", "/etc", "finished/../../secret", "finished\0", "%2e%2e", ""])
def test_no_name_leads_out_of_the_folder(served, name):
    for what in ("run", "curves", "list"):
        assert served.get(f"/api/{what}", run=name).status == 404
    assert served.get("/api/text", run=name, kind="batches", step=0, row=0).status == 404
    assert served.get("/api/list", col=f"{name}@0").status == 404


@pytest.mark.parametrize(
    "path", ["/static/../server.py", "/static/%2e%2e/server.py", "/..%2f..%2fetc/passwd", "/static/", "/api/"]
)
def test_no_path_leads_to_other_files(served, path):
    assert served.get(path).status == 404


@pytest.mark.parametrize("kind", ["../..", "checkpoints", "batches/.."])
def test_only_batches_and_evaluations_are_read(served, kind):
    assert served.get("/api/text", run="finished", kind=kind, step=0, row=0).status == 400
    assert served.get("/api/text", run="finished", kind="batches", step="0/../1", row=0).status == 400


def test_links_that_lead_out_are_not_followed(tmp_path):
    outside = write_run(tmp_path / "outside" / "secret")
    inside = tmp_path / "runs"
    run = write_run(inside / "mine")
    (inside / "linked").symlink_to(outside)
    (inside / "again").symlink_to(inside)
    for name in (
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "batches/000001.parquet",
        "evaluations/000000.parquet",
    ):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to(outside / name)
    (outside / "config.yaml").write_text("algo: {name: secret}")
    with serving(inside) as served:
        assert [r["name"] for r in served.api("runs")["runs"]] == ["mine"]
        assert b"secret" not in served.get("/api/runs").body + served.get("/api/run", run="mine").body
        assert served.api("curves", run="mine")["curves"] == {}
        assert served.api("list", run="mine")["total"] == 4
        assert served.get("/api/prompt", run="mine", step=1, row=0, count=1).status == 404


def test_every_answer_forbids_what_is_foreign(served):
    for path in ("/", "/curves", "/static/app.js", "/static/parts.js", "/api/runs", "/nowhere"):
        headers = served.get(path).headers
        assert {key: headers.get(key.lower(), headers.get(key)) for key in HEADERS} == HEADERS
    assert "unsafe" not in HEADERS["Content-Security-Policy"]


def test_only_this_machine_asks_and_only_to_read(served):
    assert served.get("/api/runs", {"Host": "evil.example"}).status == 421
    assert served.get("/api/runs", {"Host": "evil.example:80"}).status == 421
    assert served.get("/api/runs", {"Host": "localhost:1"}).status == 200
    assert served.get("/api/runs", method="POST").status == 405


def test_elsewhere_a_token_is_asked_for_and_never_told(root, caplog, capfd):
    token = "a-long-token-of-this-test"
    with caplog.at_level(logging.DEBUG), serving(root, token) as served:
        assert served.get("/").status == served.get("/api/runs").status == served.get("/static/app.js").status == 401
        for wrong in ("", "a-long-token-of-this-tesu", token + "x", "é"):
            assert served.get("/api/runs", token=wrong).status == 401
        came = served.get("/curves", token=token, run="finished")
        assert came.status == 303 and came.headers["location"] == "/curves?run=finished"
        cookie = came.headers["set-cookie"]
        assert "HttpOnly" in cookie and "SameSite=strict" in cookie
        assert served.get("/api/runs", {"Cookie": cookie.split(";")[0]}).status == 200
        assert served.get("/api/runs", {"Authorization": f"Bearer {token}"}).status == 200
        assert served.get("/api/runs", {"Cookie": cookie.split("=")[0] + "=wrong"}).status == 401
        away = served.get("//evil.example/", token=token)
        assert away.headers.get("location", "/").startswith("/") and "//" not in away.headers.get("location", "/")
    said = capfd.readouterr()
    assert token not in caplog.text + said.out + said.err


# --- the command ---


def test_nothing_heavy_is_loaded_before_the_table_of_runs_stands(root):
    code = """
import sys
from pathlib import Path
from dualign.eval.view.library import Library
import dualign.eval.view.server
assert len(Library(Path(sys.argv[1])).runs()["runs"]) == 3
print({"torch", "scipy", "transformers", "numpy", "pyarrow"} & set(sys.modules))"""
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_command_serves_until_it_is_interrupted(root):
    command = [sys.executable, "-m", "dualign", "view", str(root), "--port", "0"]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        served = Served(re.search(r"http://127.0.0.1:\d+", started.stdout.readline())[0])
        assert served.api("list", run="finished", q="apples", sort="best")["troubles"] == []
        started.send_signal(signal.SIGINT)
        assert started.wait(30) == 0 and "Traceback" not in started.stderr.read()
    finally:
        started.kill()


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    assert "no such folder" in dualign("view", tmp_path / "none").err
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(UserError, match=r"pip install 'dualign\[view\]'"):
        serve(tmp_path)


def test_a_port_that_is_taken_is_said(tmp_path):
    with serving(tmp_path) as served:
        said = dualign("view", tmp_path, "--port", served.address.rpartition(":")[2])
    assert said.code == 2 and "--port" in said.err
