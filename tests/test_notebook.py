"""A run in a notebook: tables, data frames, a figure, HTML that is inert, and progress in a real kernel."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import pytest
from matplotlib.figure import Figure
from nbclient import NotebookClient

import dualign
from dualign.common.errors import UserError
from runs_common import tree, vowels, write_prompts

NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebook" / "first_run.ipynb"
HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e" + "x" * 500


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("notebook")
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar"})
    return dualign.train(config, reward=[vowels, longer], quiet=True)


def longer(completions, **columns):
    return [None if i == 0 and len(completions) > 4 else len(c[0]["content"]) / 10 for i, c in enumerate(completions)]


def test_metrics_and_evaluations_are_lists_and_tables(run):
    metrics, frame = run.metrics(), run.metrics().frame()
    assert metrics == list(metrics) and len(frame) == 3
    assert frame["reward"].tolist() == [record["reward"] for record in metrics]
    assert frame["seconds.sample"].tolist() == [record["seconds"]["sample"] for record in metrics]
    evaluations = run.evaluations()
    table = evaluations.table()
    assert table["done"].to_pylist() == [0, 3]
    assert table["reward"].to_pylist() == [each.stats["reward"] for each in evaluations]
    frame = evaluations.frame()
    assert len(frame) == 2 and frame["kl"][0] == 0


def test_completions_are_what_the_batches_hold(run):
    found = run.completions()
    frame = found.frame()
    rows = [row for step in run.steps() for row in run.batch(step).rows]
    assert len(found) == len(frame) == len(rows) == 48
    assert frame["completion"].tolist() == [row.rollout.text for row in rows]
    assert frame["prompt"].tolist() == [row.rollout.prompt.text for row in rows]
    for name in ("vowels", "longer"):
        assert [None if v != v else v for v in frame[f"parts.{name}"]] == [row.label.parts[name] for row in rows]
    assert frame["absent"].isna().tolist() == [row.label.value is not None for row in rows]
    absent = frame[frame["reward"].isna()]
    assert len(absent) == 3 and absent["algo.weight"].isna().all()  # never a zero in place of what is not there
    assert "logp_old" not in frame and "logp_old" in run.completions(0, tokens=True).table().column_names
    assert set(run.completions([0, 2]).frame()["step"]) == {0, 2}
    held = run.completions(3, held_out=True)
    assert [each["completion"] for each in held] == [row.rollout.text for row in run.evaluations()[-1].rows]
    with pytest.raises(UserError, match="online batch 7 is not stored; there are 0 to 2"):
        run.completions(7)


def test_a_conversation_says_who_speaks(run):
    from dualign.run.frames import _prompt_text

    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert _prompt_text(said) == "system: Be brief.\nuser: hello" and _prompt_text(said[1:]) == "hello"


def test_a_plot_has_a_panel_for_each_metric(run):
    figure = run.plot()
    assert isinstance(figure, Figure) and "reward" in [axes.get_ylabel() for axes in figure.axes]
    (axes,) = run.plot("reward").axes
    training, held_out = (bars.lines[0] for bars in axes.containers)
    assert training.get_ydata().tolist() == [record["reward"] for record in run.metrics()]
    assert held_out.get_xdata().tolist() == [0, 3]
    with pytest.raises(UserError, match=r"the run has no rewrad to plot; it has .*reward"):
        run.plot("rewrad")


def test_without_the_libraries_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match=r"pip install pandas .table\(\) is the same"):
        run.metrics().frame()
    assert run.metrics().table().num_rows == 3
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"dualign\[plots\]"):
        run.plot()


def test_html_is_inert(run, tmp_path):
    batch = run.batch(0)
    rows = tuple(replace(row, rollout=replace(row.rollout, text=HOSTILE)) for row in batch.rows)
    other = dualign.Run(tmp_path / "<img src=x onerror=alert(1)>")
    other.create(run.config_file.read_text())
    other.write_batch(replace(batch, rows=rows))
    for html in (other.completions()._repr_html_(), other._repr_html_(), dualign.Run(tmp_path / "<b>")._repr_html_()):
        assert not any(bad in html for bad in ("<script", "<img", "<b>&", "\x1b", "\u202e"))
    shown = other.completions()._repr_html_()
    assert "&lt;script&gt;" in shown and len(shown) < 16_000
    assert "held-out gain" in run._repr_html_() and "polyline" in run._repr_html_()


def test_a_damaged_file_is_named(run, tmp_path):
    other = dualign.Run(tmp_path / "run")
    other.create(run.config_file.read_text())
    other.write_batch(run.batch(0))
    other.batch_path(0).write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"000000\.parquet: damaged"):
        other.completions().table()


def test_the_example_notebook_runs_and_shows_its_progress(tiny, tmp_path):
    """In a real kernel, where an event loop runs already and standard output is no terminal; on a tiny model, with a
    reward that is async."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    settings, reward = (cell for cell in notebook.cells if "SETTINGS = [" in cell.source or "def brief" in cell.source)
    prompts = write_prompts(tmp_path)
    own = [f"model.name={tiny}", "model.precision=fp32", f"data.train={prompts}", f"data.eval={prompts}"]
    own += [
        "rollout.max_new_tokens=12",
        "train.online_batches=2",
        "train.online_batch=16",
        "train.micro_batch_tokens=128",
    ]
    settings.source += f"\nSETTINGS += {[*own, 'train.update_size=8', 'eval.prompts=4']!r}"
    reward.source = reward.source.replace("def brief", "async def brief")
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": tmp_path}})
    client.execute()
    outputs = {cell.source.splitlines()[-1]: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert not [o for shown in outputs.values() for o in shown if o["output_type"] == "error"]
    trained = next(shown for source, shown in outputs.items() if "dualign.train" in source)
    said = "".join(o.get("text") or o["data"].get("text/plain", "") for o in trained)
    assert "batch 1" in said and "held-out reward" in said
    assert "2 of 2 online batches, finished" in outputs["run"][0]["data"]["text/html"]
    assert len(outputs["run.plot()"]) == 1 and "image/png" in outputs["run.plot()"][0]["data"]
    assert "<th>reward</th>" in outputs["run.evaluations()"][0]["data"]["text/html"]
