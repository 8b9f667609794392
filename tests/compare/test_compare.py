"""A grid is run, cut off, gone on with and reported; the report's numbers are those of the runs."""

from __future__ import annotations

import csv
import json
import math
import re
import signal
import statistics
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

import dualign
from command import dualign as command
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.config import dump
from dualign.eval.compare import cells as running
from dualign.eval.compare.cells import CellError, run_grid, state
from dualign.eval.compare.grid import cells, load, selection_cells
from dualign.eval.compare.plan import plan_lines
from dualign.eval.compare.report import write_report
from dualign.run.folder import Run
from dualign.run.verify import verify
from dualign.training.resume import resumed_config
from runs_common import launch, reward_file, tree, write_prompts

T95 = {2: 12.706204736432095, 3: 4.302652729696142}  # t quantiles for two and three seeds


def grid_writer(model, folder):
    """Writes GRID.yaml over a tiny base recipe; keyword arguments are the grid's keys."""
    base = tree(model, write_prompts(folder), folder / "unused", {"name": "dar"}, online_batches=2, online_batch=8)
    base |= {"reward": [reward_file()], "eval": {"prompts": 3, "every": 1}}
    (folder / "base.yaml").write_text(yaml.safe_dump(base))

    def write(**keys):
        keys = {"base": str(folder / "base.yaml"), "out": str(folder / "out"), "seeds": [0, 1], **keys}
        path = folder / "grid.yaml"
        path.write_text(yaml.safe_dump(keys, sort_keys=False))
        return path

    return write


@pytest.fixture
def grid_file(tiny, tmp_path):
    return grid_writer(tiny, tmp_path)


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """The same, of a folder in which TWO are finished with three seeds."""
    write = grid_writer(tiny, tmp_path_factory.mktemp("finished"))
    assert run_grid(load(write(systems=TWO, seeds=[0, 1, 2])), here, print) == {}
    return write


@pytest.fixture
def undrawn(monkeypatch):
    """A report's words without its figures, which other tests look at."""
    monkeypatch.setattr("dualign.eval.compare.plots.draw", lambda results, folder: [])


def here(cell, resume, stopping):
    """Runs a cell in this process: no seconds lost to start another Python."""
    try:
        config = resumed_config(cell.folder, ()) if resume else cell.config
        dualign.train(config, resume=resume, quiet=True)
    except UserError as error:
        raise CellError(str(error)) from None


TWO = {"dar": {}, "grpo": {"algo": {"name": "grpo"}}}


def test_interrupted_after_one_cell_it_goes_on_with_the_second(grid_file):
    grid = load(grid_file(systems=TWO))
    begun = []

    def cut_off(cell, resume, stopping):
        if begun:
            raise KeyboardInterrupt
        begun.append(cell.name)
        here(cell, resume, stopping)

    with pytest.raises(KeyboardInterrupt):
        run_grid(grid, cut_off, print)
    every = cells(grid, {})
    assert [state(c) for c in every] == ["finished", "to do", "to do", "to do"]
    before = {p: p.stat().st_mtime_ns for p in every[0].folder.rglob("*")}

    again = []

    def counted(cell, resume, stopping):
        again.append(cell.name)
        here(cell, resume, stopping)

    assert run_grid(grid, counted, print) == {}
    assert again == ["grpo seed 0", "dar seed 1", "grpo seed 1"]
    assert {p: p.stat().st_mtime_ns for p in every[0].folder.rglob("*")} == before
    assert {state(c) for c in every} == {"finished"}


def test_the_table_is_what_the_summaries_say(finished):
    grid = load(finished(systems=TWO, seeds=[0, 1, 2], reference="grpo", at_kl=[1e6], at_reward=[-1e6, 1e6]))
    table = write_report(grid, {})
    report = list(csv.DictReader((grid_out(grid) / "report" / "table.csv").open()))
    for row in report:
        folders = [grid_out(grid) / row["system"] / f"seed{s}" for s in (0, 1, 2)]
        summaries = [json.loads((f / "summary.json").read_text()) for f in folders]
        for column, values in {
            "reward": [s["after"]["reward"] for s in summaries],
            "kl": [s["after"]["kl"] for s in summaries],
            "length": [s["after"]["length"] for s in summaries],
            "gain_sd": [s["gain_sd"] for s in summaries],
            "labels": [s["labels"] for s in summaries],
        }.items():
            known = [v for v in values if v is not None]  # of equal rewards there is no gain in sd
            if not known:
                assert row[column] == row[f"{column}_ci"] == "", column
                continue
            assert float(row[column]) == pytest.approx(statistics.mean(known), abs=1e-9), column
            if len(known) < 2 or (statistics.stdev(known) < 1e-12 and column != "labels"):
                assert row[f"{column}_ci"] == "", f"{column}: seeds that agree say nothing of others"
                continue
            half = T95[len(known)] * statistics.stdev(known) / math.sqrt(len(known))
            assert float(row[f"{column}_ci"]) == pytest.approx(half, rel=1e-6, abs=1e-9), column
        assert row["seeds"] == "3" and float(row["labels"]) == 16
        reward = statistics.mean(s["after"]["reward"] for s in summaries)
        (line,) = (line for line in table.splitlines() if line.startswith(f"| {row['system']} |"))
        assert f"{reward:.3f} ± " in line
        assert row["reward_at_kl_1e+06"] == row["labels_to_reward_1e+06"] == ""  # none gets there
        assert float(row["labels_to_reward_-1e+06"]) == 0  # all were there before the first label
    said = command("compare", finished(systems=TWO, seeds=[0, 1, 2], reference="grpo"), "--report-only", "--json")
    told = json.loads(said.out)
    assert "report.md" in said.err and told["unfinished"] == {} and "3 prompts" in told["too_few_prompts"]
    for row, each in zip(report, told["systems"], strict=True):
        assert each["means"]["reward"]["value"] == pytest.approx(float(row["reward"]), abs=1e-9)
        assert (each["system"], each["means"]["labels"]["half"]) == (row["system"], 0.0)
    assert command("compare", finished(systems=TWO), "--dry-run", "--json").code == 2
    # α-interpolated KL: α·KL for DAR, the whole of it for a system that knows π_0 alone
    dar, grpo = report
    assert float(dar["kl_interpolated"]) == pytest.approx(0.1 * float(dar["kl"]), abs=1e-9)
    assert float(grpo["kl_interpolated"]) == pytest.approx(float(grpo["kl"]), abs=1e-9)
    assert float(grpo["labels_to_reference"]) <= 16
    curves = list(csv.DictReader((grid_out(grid) / "report" / "curves.csv").open()))
    assert len(curves) == 6 * 3 and {c["labels"] for c in curves} == {"0", "8", "16"}
    figures = {p.name for p in (grid_out(grid) / "report").iterdir()}
    for name in ("curves", "behaviour", "pareto", "seconds"):
        assert {f"{name}.png", f"{name}.svg"} <= figures
        assert (grid_out(grid) / "report" / f"{name}.png").stat().st_size > 5000


def test_a_failing_cell_is_named_and_the_others_go_on(grid_file, tmp_path, undrawn):
    systems = {**TWO, "broken": {"data": {"train": str(tmp_path / "nowhere.jsonl")}}}
    grid = load(grid_file(systems=systems, seeds=[0]))
    failed = run_grid(grid, here, print)
    assert list(failed) == ["broken seed 0"] and "nowhere.jsonl" in failed["broken seed 0"]
    assert [state(c) for c in cells(grid, {})][:2] == ["finished", "finished"]
    write_report(grid, failed)
    report = (grid_out(grid) / "report" / "report.md").read_text()
    assert re.search(r"- broken seed 0: failed: .*nowhere\.jsonl", report)


def test_a_cell_that_stopped_says_why(grid_file, monkeypatch):
    """And not, how it would be resumed: that is the grid's doing."""

    def start(words, log):
        said = command(*words)
        log.write_text(said.text)
        return 0, lambda seconds: said.code

    monkeypatch.setattr(running, "_forked", start)
    grid = load(grid_file(systems={"dar": {}}, seeds=[0], set={"reward": [reward_file("silent")]}))
    failed = run_grid(grid, running.subprocesses("", 1), print)
    assert failed["dar seed 0"].startswith("exit code 3: dualign: held-out evaluation after 0 online batches: 3 of 3 ")


def test_the_best_rate_is_selected_on_a_seed_of_its_own(grid_file, undrawn):
    select = {"key": "train.lr", "values": [1e-9, 3e-3], "seed": 7, "set": {"eval.every": 0}}
    grid = load(grid_file(systems={"dar": {}}, seeds=[0], select=select))
    rewards = {1e-9: 0.5, 3e-3: 0.75}

    def pretend(cell, resume, stopping):
        here(cell, resume, stopping)
        if cell.seed == 7:
            summary = json.loads((cell.folder / "summary.json").read_text())
            summary["after"]["reward"] = rewards[cell.value]
            (cell.folder / "summary.json").write_text(json.dumps(summary))

    assert run_grid(grid, pretend, print) == {}
    assert [c.config.run.seed for c in selection_cells(grid)] == [7, 7]
    assert not any(list((c.folder / "checkpoints").iterdir()) for c in selection_cells(grid))  # weights not wanted
    (cell,) = cells(grid, running.selected(grid))
    kept = {p.name for p in (cell.folder / "checkpoints").rglob("*.safetensors")}
    assert kept == {"model.safetensors"} and not [f for f in verify(cell.folder) if f.kind == "damaged"]
    assert cell.config.train.lr == 3e-3 and cell.config.run.seed == 0 and state(cell) == "finished"
    write_report(grid, {})
    text = (grid_out(grid) / "report" / "report.md").read_text()
    assert re.search(r"\| dar \| 0\.500 \(\d+%\) \| 0\.750 \(\d+%\) \| 0\.003 \(edge of the grid\) \|", text)
    assert "seed 7" in text


def test_a_collapsed_run_is_not_chosen_and_counts_where_all_collapsed(grid_file):
    """The higher rate has the higher reward, with the same answer to every prompt."""
    select = {"key": "train.lr", "values": [1e-9, 3e-3], "seed": 7, "distinct": 0.5}
    grid = load(grid_file(systems={"dar": {}}, seeds=[0], select=select))
    low, high = selection_cells(grid)
    for cell, reward, answers in ((low, 0.5, list("abcd")), (high, 0.75, list("aaaa"))):
        finish(cell, reward, answers)
    assert running.selected(grid) == {"dar": 1e-9}
    finish(low, 0.5, list("bbbb"))
    assert running.selected(grid) == {"dar": 3e-3}
    finish(high, 0.0, list("abcd"))  # a reward of zero is a reward
    finish(low, -0.5, list("abcd"))
    assert running.selected(grid) == {"dar": 3e-3}


def finish(cell, reward, answers):
    """What a selection reads of a finished run."""
    (cell.folder / "evaluations").mkdir(parents=True, exist_ok=True)
    (cell.folder / "config.yaml").write_text(dump(cell.config))
    (cell.folder / "summary.json").write_text(json.dumps({"after": {"batches": 2, "reward": reward}}))
    pq.write_table(pa.table({"completion": answers}), Run.open(cell.folder).evaluation_path(2))


def test_a_report_reads_no_run_of_other_settings(grid_file, undrawn):
    """Neither a compared one nor one of the selection; what was reported before stays."""
    select = {"key": "train.lr", "values": [1e-3], "seed": 7}
    path = grid_file(systems={"dar": {}}, seeds=[0], select=select)
    assert run_grid(load(path), here, print) == {}
    write_report(load(path), {})
    table = grid_out(load(path)) / "report" / "table.csv"
    before = table.read_text()
    for changed in ({"select": {**select, "set": {"eval.prompts": 2}}}, {"select": select, "set": {"rollout.k": 2}}):
        other = load(grid_file(systems={"dar": {}}, seeds=[0], **changed))
        with pytest.raises(UserError, match="holds a run with other settings"):
            write_report(other, {})
        assert table.read_text() == before


def test_runs_of_another_version_are_named(finished, undrawn):
    grid = load(finished(systems=TWO, seeds=[0, 1]))
    write_report(grid, {})
    report = grid_out(grid) / "report" / "report.md"
    assert "versions of the code" not in report.read_text()
    about = grid_out(grid) / "grpo" / "seed1" / "run.json"
    as_it_was = about.read_text()
    about.write_text(json.dumps(json.loads(as_it_was) | {"code": "another"}))
    write_report(grid, {})
    about.write_text(as_it_was)
    assert "begun by 2 versions of the code or its packages; unlike most: grpo seed 1." in report.read_text()


def test_a_failed_cell_is_in_no_table_even_with_a_summary(finished, undrawn):
    grid = load(finished(systems=TWO, seeds=[0]))
    assert "| grpo |" in write_report(grid, {}) and "| grpo |" not in write_report(grid, {"grpo seed 0": "killed"})


def test_an_ablation_moves_one_key_and_shares_the_base(grid_file):
    axes = {
        "algo.alpha": [0.0, 0.1],
        "algo.beta": [0.05, 0.5],
        "rollout.k": [{"rollout.k": 1, "algo.baseline": "batch"}, 4],
    }
    grid = load(grid_file(systems={"dar": {"axes": axes}}, seeds=[0]))
    found = cells(grid, {})
    settings = [(c.axis, c.value, c.config.algo.alpha, c.config.algo.beta, c.config.rollout.k) for c in found]
    assert settings == [
        ("algo.alpha", 0.0, 0.0, 0.05, 4),
        ("algo.alpha", 0.1, 0.1, 0.05, 4),
        ("algo.beta", 0.05, 0.1, 0.05, 4),
        ("algo.beta", 0.5, 0.1, 0.5, 4),
        ("rollout.k", 1, 0.1, 0.05, 1),
        ("rollout.k", 4, 0.1, 0.05, 4),
    ]
    assert found[1].folder == found[2].folder == found[5].folder  # α = .1, β = .05, K = 4 is one run
    assert {c.config.train.online_batch for c in found} == {8}  # equal labels at every K
    assert run_grid(grid, here, print) == {}
    table = write_report(grid, {})
    assert len(table.splitlines()) == 2 + 6 and "| dar | rollout.k = 1 |" in table
    assert (grid_out(grid) / "report" / "ablation-rollout.k.svg").is_file()


def test_numbers_of_other_settings_are_not_mixed_in(grid_file):
    path = grid_file(systems={"dar": {}}, seeds=[0])
    run_grid(load(path), here, print)
    changed = load(grid_file(systems={"dar": {"train": {"lr": 5e-4}}}, seeds=[0]))
    with pytest.raises(UserError, match=r"other settings.*train\.lr: 0\.001, now 0\.0005"):
        run_grid(changed, here, print)


def test_cells_with_adapters_of_before_value_models_had_any_are_the_same_cells(grid_file):
    """Whole value models, where there are some, are another setting."""
    systems = {name: {"algo": {"name": name}, "model": {"lora": {"r": 4}}} for name in ("dar", "ppo")}
    path = grid_file(systems=systems, seeds=[0])
    for cell in cells(load(path), {}):
        cell.folder.mkdir(parents=True)
        (cell.folder / "run.json").write_text("{}")
        (cell.folder / "config.yaml").write_text(re.sub("\n.*value_model.*", "", dump(cell.config)))
    dar, ppo = cells(load(path), {})
    assert state(dar) == "interrupted"
    with pytest.raises(UserError, match=r"model\.lora\.value_model: whole, now adapters"):
        state(ppo)


def test_dry_run_counts_runs_labels_and_time(grid_file):
    grid = load(grid_file(systems={"dar": {}, "grpo": {"algo": {"name": "grpo"}}}))
    lines = plan_lines(grid)
    assert lines[0].startswith("4 runs") and sum("16 labels to train, 9 to evaluate" in line for line in lines) == 4
    assert "still to do: 4 runs, 64 labels to train and 36 to evaluate" in lines[-2] and "unknown" in lines[-1]
    here(cells(grid, {})[0], False, None)
    lines = plan_lines(grid)
    assert "finished" in lines[1] and "still to do: 3 runs" in lines[-2] and "by the 1 finished" in lines[-1]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"system": {}}, "system: Extra inputs"),
        ({"systems": TWO, "reference": "grop"}, "reference: no system 'grop'"),
        ({"systems": {"dar": {"algo": {"alfa": 1}}}}, "algo.alfa: no such key"),
        ({"select": {"values": [1], "seed": 0}}, "select.seed: 0 is also compared"),
        ({"seeds": [0, 1, 0]}, "seeds: [0, 1, 0] names one twice"),
        (
            {"set": {"train.lr": 1e-3}, "systems": {"dar": {"train": {"lr": 1e-4}}}},
            "systems.dar: train.lr is 0.0001 here and 0.001 in `set`",
        ),
        *(
            (
                {"set": {f"rollout.{one}": 8}, "systems": {"dar": {"rollout": other}}},
                f"systems.dar: rollout.{one} is 4 here and 8 in `set`",
            )
            for one, other in (  # by its old name and by that of now
                ("options.decode_batch_size", {"rows": 4}),
                ("rows", {"options": {"decode_batch_size": 4}}),
                ("rows", {"rows": 4}),
            )
        ),
        (
            {"axes": {"rollout.k": [{"rollout.k": 4, "algo.baseline": b} for b in ("batch", "none")]}},
            "axes.rollout.k: two settings are called 4",
        ),
    ],
)
def test_mistakes_in_a_grid_are_named(grid_file, keys, message):
    with pytest.raises(UserError, match=re.escape(message)):
        cells(load(grid_file(**keys)), {})


def test_sweep_without_axes_says_what_to_do(grid_file):
    with pytest.raises(UserError, match="no axes to sweep; `dualign compare"):
        CliRunner().invoke(application(), ["sweep", str(grid_file(systems=TWO)), "--dry-run"], catch_exceptions=False)


SLOW = """
import os, time

def score(completions, **columns):
    time.sleep(os.path.exists({!r}))
    return [len(c[0]["content"]) / 9 for c in completions]
"""


def slow_reward(folder):
    """A reward that takes a second a batch as long as the file `slow` is there."""
    (folder / "slow").touch()
    (folder / "reward.py").write_text(SLOW.format(str(folder / "slow")))
    return [{"type": "function", "path": f"{folder / 'reward.py'}:score"}]


def test_the_command_hands_an_interrupt_on_and_resumes(grid_file, tmp_path):
    """Real processes: the first cell is stopped in the middle, saves itself, and the next call resumes it."""
    system = {"train": {"online_batches": 40}, "reward": slow_reward(tmp_path)}
    path = grid_file(systems={"dar": system}, seeds=[0], set={"eval.every": 0})
    folder = tmp_path / "out" / "dar" / "seed0"
    started = launch(path, command="compare", wait=False)
    wait_for(lambda: len(list(folder.glob("batches/*.parquet"))) >= 3)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=300)
    assert started.returncode == 130, err
    assert list(folder.glob("checkpoints/0*")), "the cell did not save itself"
    assert not (folder / "summary.json").exists()
    (cell,) = cells(load(path), {})
    assert state(cell) == "interrupted"
    (tmp_path / "slow").unlink()
    done = len(list(folder.glob("batches/*.parquet")))
    assert command("resume", folder, f"train.online_batches={done + 1}").code == 0
    assert (folder / "summary.json").is_file()


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_is_not_a_cells_own_failure_ends_the_grid_at_once(grid_file, jobs):
    grid = load(grid_file(systems={name: {} for name in "abcd"}, seeds=[0]))
    begun = []

    def broken(cell, resume, stopping):
        begun.append(cell.system)
        if cell.system == "a":
            raise OSError("no room on the disk")
        assert stopping.wait(60), "no one asked it to stop"
        raise CellError("cut off")

    said = []
    with pytest.raises(OSError, match="no room"):
        run_grid(grid, broken, said.append, jobs)
    assert set(begun) <= set("ab"[:jobs]) and not any("FAILED" in line for line in said)


@pytest.mark.slow
def test_cells_side_by_side_are_stopped_and_finished_together(grid_file, tmp_path):
    """Real processes, two at a time: an interrupt reaches both, and the next call finishes all three."""
    common = {"reward": slow_reward(tmp_path)}
    path = grid_file(systems={name: {"algo": {"name": name}} | common for name in ("dar", "grpo", "rloo")},
                     seeds=[0], set={"train.online_batches": 20, "eval.every": 0})  # fmt: skip
    folders = [tmp_path / "out" / name / "seed0" for name in ("dar", "grpo", "rloo")]
    started = launch(path, "--jobs", "2", command="compare", wait=False)
    wait_for(lambda: all(len(list(f.glob("batches/*.parquet"))) >= 2 for f in folders[:2]))
    assert not folders[2].exists()
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=300)
    assert started.returncode == 130 and "FAILED" not in out, (out, err)
    assert all(list(f.glob("checkpoints/0*")) and not (f / "summary.json").exists() for f in folders[:2])
    assert not folders[2].exists()
    (tmp_path / "slow").unlink()
    done = command("compare", path, "--jobs", "2")
    assert done.code == 0 and done.out.count("resumed") == 2, done.text
    assert all((f / "summary.json").is_file() for f in folders)


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


def grid_out(grid):
    return Path(grid.out)
