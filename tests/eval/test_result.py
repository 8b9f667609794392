"""Results render without it being known whose they are: today's, those of earlier versions, and a user's own."""

import json
from pathlib import Path

import pytest

from command import dualign as command
from dualign.eval import store
from dualign.eval.evaluation import Column, Estimate, Plot, Result, Table, per_prompt
from dualign.eval.outputs import Answer, Outputs, grouped
from dualign.eval.report.tables import evaluations
from dualign.eval.show import show

PROMPTS = [{"id": f"p{i}", "prompt": f"say {i}", "completion": "x" * i} for i in range(4)]


def longer(completions, **columns):
    return [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("column", "cell", "text"),
    [
        (Column("a"), "as it is", "as it is"),
        (Column("a"), None, "–"),
        (Column("a"), float("nan"), "–"),
        (Column("a"), 12345, "12,345"),
        (Column("a"), (3, 0, 1), "3/0/1"),
        (Column("a", "{:.0f} tokens"), 12.4, "12 tokens"),
        (Column("a", "{:.1%}", "{:.0%}"), Estimate(0.5, 0.25, 0.75, 9), "50.0% [25%, 75%]"),
        (Column("a", "{:+.2f}"), {"value": 1, "low": None, "high": None, "n": 1}, "+1.00 (no interval, n=1)"),
    ],
)
def test_the_column_decides_how_a_cell_is_written(column, cell, text):
    assert column.text(cell) == text


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Column("a", "{0.__class__}"), "expected one number's"),
        (lambda: Column("a", "{:d}{:d}"), "expected one number's"),
        (lambda: Table("t", [Column("a")], [[1, 2]]), "a row of 2 cells for 1 columns"),
        (lambda: Table("t", [Column("a", "{:d}")], [[1.5]]), "format code 'd'"),
        (lambda: Table("t", [Column("a")], [[1]], plot=Plot("p", "a", ["b"], "P", "p")), r"does not have: \['b'\]"),
        (lambda: Table("t", [Column("a")], [["x"]], plot=Plot("p", "a", ["a"], "P", "p")), "other things than numbers"),
    ],
)
def test_a_table_that_cannot_be_shown_is_refused_where_it_is_made(make, told):
    with pytest.raises((TypeError, ValueError), match=told):
        make()


def test_a_result_is_read_as_it_was_written(tmp_path, capsys):
    plot = Plot("p", "at", ["share"], "P", "p", line=0.5, mark=1)
    columns = [Column("at"), Column("share", "{:.0%}")]
    rows = [[0, Estimate(0.5, float("-inf"), float("inf"), 1)], [1, 0.75]]
    table = Table("T", columns, rows, ["note"], about={"judge": "J"}, over="policy", plot=plot)
    written = store.write(tmp_path / "eval" / "t.json", Result([{"id": 1}], "H", [table], {"kind": "t"}))
    (read,) = store.read_all(tmp_path)
    assert read.tables[0].texts() == table.texts() == [["0", "50% (no interval, n=1)"], ["1", "75%"]]
    assert (read.headline, read.tables[0].plot, read.tables[0].about) == ("H", plot, {"judge": "J"})
    assert read.tables[0].is_about(tmp_path)
    show(written)
    said = capsys.readouterr().out
    assert all(text in said for text in ("T, judge J", "note", "H", "t.json, every row in t.jsonl"))
    assert (tmp_path / "eval" / "t.jsonl").read_text() == '{"id": 1}\n'


E = {"value": 0.5, "low": 0.25, "high": 0.75, "n": 24}
BEFORE = {
    "cheat": {
        "second": "builtin:helpful", "verdict": "V", "signs": ["S"], "from_batch": 1, "batches": [
            {"batch": i, "reward_sd": 0.5, "second_sd": None, "kl": 1.0, "missing_eos": 0.1, "length": 4.0,
             "distinct_2": 0.8, "repetition": 0.0, "refusals": 0.0, "same_opening": 0.1} for i in range(2)
        ],
    },
    "mtbench": {"source": "RUN", "run": "..", "headline": "5.00 of 10", "absent": 0, "judge": {"model": "m"},
                "rows": {"all": {"turn_1": E, "turn_2": E, "both": E}}},
    "ifeval": {"source": "RUN", "headline": "I", "checked": 2, "absent": 1, "absent_reasons": ["why"],
               "prompt_strict": E, "prompt_loose": E, "instruction_strict": 0.5, "instruction_loose": None},
    "winrate": {"judge": {"name": "J"}, "systems": [{"source": "RUN", "points": [
        {"a": "batch 1", "b": "π_0", "labels": 8, "win_rate": E, "length_controlled": E, "won": 1, "tied": 0, "lost": 1,
         "absent": 0, "chars_a": None, "chars_b": None, "swap_consistency": None, "by_length": []}]}]},
    "reward": {"judge": {"judge": "run"}, "systems": [{"source": "RUN", "points": [
        {"name": "π_0", "labels": 0, "reward": E, "gain": E, "gain_sd": 0.5, "absent": 0}]}]},
}  # fmt: skip


@pytest.mark.parametrize("kind", BEFORE)
def test_results_of_earlier_versions_are_shown(kind, tmp_path):
    run = tmp_path / "run"
    (run / "eval").mkdir(parents=True)
    text = json.dumps({"kind": kind, "command": "dualign", **BEFORE[kind]}).replace("RUN", str(run))
    (run / "eval" / "x.json").write_text(text)
    (result,) = store.read_all(run)
    (table,) = result.tables
    assert table.is_about(run) and len(table.rows) == len(BEFORE[kind].get("batches", "x" * len(table.rows)))
    assert result.headline == BEFORE[kind].get("headline", BEFORE[kind].get("verdict", ""))


def test_what_a_table_says_is_inert_on_the_page():
    class Page:
        name = "<b>run"
        tables = (Table("<i>T", [Column("<u>C")], [["<script>"]], ["<img>"], about={"<p>": "<q>"}, over="<o>"),)

    assert not {"<b>", "<i>", "<u>", "<script>", "<img>", "<p>", "<q>", "<o>"} & set(evaluations([Page]).split())
    assert "&lt;script&gt;" in evaluations([Page]) and "<script" not in evaluations([Page])


def test_prompts_are_the_independent_draws():
    from dualign.common.types import Prompt

    one, two = Prompt("a", "1"), Prompt("b", "2")
    answers = [Answer(one, "x"), Answer(one, "xxx"), Answer(two, "", absent="why"), Answer(two, "x")]
    assert per_prompt(Outputs("o", grouped(answers)), lambda answer: len(answer.text)) == [2.0, 1.0]


OWN = """
from pathlib import Path
from dualign.eval.evaluation import Column, Evaluation, Result, Table, score

class Rewards(Evaluation):
    judge: str

    def run(self, sources):
        tables = []
        for source in sources:
            (policy,) = source.policies()
            with source.judge(self.judge) as judge:
                labels = [label.value for label in score(judge, list(policy))]
            tables.append(Table("Rewards", [Column("total")], [[sum(labels)]], source=source.name))
        return Result([], "done", tables)

class Broken(Evaluation):
    def run(self, sources):
        return 1 / 0

class Nothing(Evaluation):
    def run(self, sources):
        return {}

class Odd(Evaluation):
    def run(self, sources):
        return Result([{"path": Path("x")}], "", [])

class Other:
    pass
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "o.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return tmp_path


def test_an_evaluation_asks_a_judge_and_says_which(own):
    said = command("eval", "own.py:Rewards", "o.jsonl", f"judge={Path(__file__)}:longer")
    assert said.code == 0 and "o.jsonl: Rewards" in said.out, said.text
    (file,) = (own / "eval").glob("Rewards-*.json")
    result = json.loads(file.read_text())
    assert result["tables"][0]["rows"] == [[6.0]] and result["judges"][0]["name"] == "longer"
    assert result["sources"][0]["sampling"] == {"prompts": "those of o.jsonl"}
    command("eval", "own.py:Rewards", own / "o.jsonl", f"judge={Path(__file__)}:longer", "--prompts", own / "o.jsonl")
    assert len(list((own / "eval").glob("Rewards-*.json"))) == 2, "asked otherwise, another file"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Broken", "evaluation Broken raised ZeroDivisionError: division by zero, {own} line 19"),
        ("Nothing", "evaluation Nothing: run returned dict, and no Result"),
        ("Odd", "evaluation Odd raised TypeError"),
        ("Other", "expected a class derived from dualign.eval.evaluation.Evaluation"),
        ("Rewards", "evaluation own.py:Rewards: judge: missing; give judge=VALUE"),
    ],
)
def test_an_evaluation_at_fault_is_named(own, name, told):
    said = command("eval", f"own.py:{name}", "o.jsonl")
    assert said.code == 2 and told.replace("{own}", str(own / "own.py")) in said.err, said.text
    assert not list((own / "eval").glob("*.json*")) if (own / "eval").exists() else True


def test_settings_alone_are_nothing_to_evaluate(own):
    said = command("eval", "own.py:Rewards", "judge=run")
    assert said.code == 2 and "nothing to evaluate" in said.err
