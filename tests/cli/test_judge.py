"""The four commands, end to end against a server."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer
from typer.testing import CliRunner

from command import dualign as command
from dualign.annotate.labelled import write_rows
from dualign.cli import judge as commands
from dualign.common.errors import StopRun, UserError
from dualign.data.rows import load_prompts
from fault_server import FaultServer

app = typer.Typer()
commands.register(app)


def run(*arguments: object) -> str:
    """Its output; raises what the command raised."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def message(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """30 pairs; people prefer the one of higher quality in the first 24."""
    rows = []
    for i in range(30):
        a, b = f"answer {i} quality-{i % 5 + 4}", f"other {i} quality-{i % 3 + 1}"
        rows.append({"id": f"r{i}", "prompt": message("user", f"question {i}"), "response_a": message("assistant", a),
                     "response_b": message("assistant", b), "label": "a" if i < 24 else "b",
                     "votes": {"a": 2, "b": 1, "tie": 0}})  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def judge_options(server: FaultServer, folder: Path) -> list[object]:
    cache = f"cache={folder / 'c.sqlite'}"
    return [
        "--rubric",
        "helpfulness",
        "--base-url",
        server.url,
        "--model",
        "m",
        "--set",
        cache,
        "--set",
        "timeout=20.0",
    ]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rewards_of_a_file(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with FaultServer() as server:
        told = run("judge", pairs, *judge_options(server, tmp_path), "--out", out)
    assert "60 of 60 labelled" in told
    rows = read(out)
    assert [(r["id"], r["response"]) for r in rows[:3]] == [("r0", "a"), ("r0", "b"), ("r1", "a")]
    assert all(r["reward"] == int(r["completion"].rsplit("-", 1)[1]) for r in rows)


def test_show_prints_what_is_asked_said_and_read_and_writes_nothing(pairs: Path, tmp_path: Path) -> None:
    with FaultServer() as server:
        told = run("judge", pairs, *judge_options(server, tmp_path), "--show", 2)
        assert server.stats.calls == 4  # two rows of two responses
        compared = run("judge", pairs, *judge_options(server, tmp_path), "--show", 1, "--pairs")
        with pytest.raises(UserError, match="--show 3"):
            run("judge", pairs, *judge_options(server, tmp_path))
    assert told.count("--- r0") == 2 and "You are an experienced rater" in told and "answer 0 quality-4" in told
    assert "=== 4.0" in told and ">>> " in told
    assert "=== response_a" in compared or "=== a" in compared
    assert not list(tmp_path.glob("*.parquet"))


def test_absent_rows_are_named_and_asked_again(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    with FaultServer(faults=0.5, kinds=("refusal",), seed=1) as server:
        told = run("judge", pairs, *judge_options(server, tmp_path), "--out", out)
        rows = pq.read_table(out).to_pylist()
        absent = [r for r in rows if r["reward"] is None]
        assert absent and {r["reason"] for r in absent} == {"refused"}
        assert f"absent: {len(absent)} × refused. Replies: “I'm sorry" in told and f"{60 - len(absent)} of 60" in told
        server.faults = 0.0
        calls = server.stats.calls
        run("judge", pairs, *judge_options(server, tmp_path), "--out", out)
        assert server.stats.calls - calls == len(absent)
    assert all(r["reward"] is not None for r in pq.read_table(out).to_pylist())


def test_preferences_of_a_file(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with FaultServer() as server:
        run("judge", pairs, *judge_options(server, tmp_path), "--pairs", "--out", out)
        assert server.stats.calls == 60
    assert [(r["better"], r["value"], r["first_order"], r["second_order"]) for r in read(out)] == [
        ("a", 1.0, "a", "a")
    ] * 30


def test_a_spent_budget_leaves_no_half_file_and_goes_on(pairs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with FaultServer() as server:
        with pytest.raises(StopRun, match="max_calls 25"):
            run("judge", pairs, *judge_options(server, tmp_path), "--out", out, "--set", "max_calls=25")
        assert [p.name for p in tmp_path.iterdir() if "out" in p.name] == []
        assert server.stats.calls == 25
        run("judge", pairs, *judge_options(server, tmp_path), "--out", out)
        assert server.stats.calls == 60
    assert len(read(out)) == 60


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--set", "temprature=1"], "temprature"), (["--set", "nonsense"], "key=value"), 
        (["--rubric", "kindness"], "kindness"),
        (["--base-url", "nowhere"], "base_url"), (["--out", "x.csv"], ".jsonl or .parquet"),
    ],
)  # fmt: skip
def test_mistakes_are_told(pairs: Path, tmp_path: Path, change: list[str], told: str) -> None:
    with FaultServer() as server, pytest.raises(UserError, match=told):
        run("judge", pairs, *judge_options(server, tmp_path), "--out", tmp_path / "out.jsonl", *change)


def test_labels_and_granularity(pairs: Path, tmp_path: Path) -> None:
    one, two, export = tmp_path / "one.jsonl", tmp_path / "two.parquet", tmp_path / "export.jsonl"
    with FaultServer() as server:
        for out in (one, two):
            said = command("judge", pairs, *judge_options(server, tmp_path), "--out", out, "--json")
            assert json.loads(said.out) == {"out": str(out), "asked": 60, "labelled": 60, "absent": {}}
        (shown, _) = json.loads(command("judge", pairs, *judge_options(server, tmp_path), "--show", 1, "--json").out)
        assert shown["reward"] is not None and "SCORE" in shown["asked"]
    told = run("labels", "--cache", tmp_path / "c.sqlite", "--export", export)
    assert "helpfulness" in told and "60" in told
    assert len(read(export)) == 60 and read(export)[0]["request"]["messages"]
    numbers = tmp_path / "g.json"
    assert "1.0000" in run("granularity", one, two, "--out", numbers)
    assert json.loads(numbers.read_text())["rows"] == 60
    assert command("granularity", one, two, "--json").out == numbers.read_text()
    (kept,) = json.loads(command("labels", "--cache", tmp_path / "c.sqlite", "--json").out)["labels"]
    assert kept["labels"] == 60 and kept["rubric"] == "helpfulness"
    with pytest.raises(UserError, match="no cache"):
        run("labels", "--cache", tmp_path / "none.sqlite")


def test_agreement(pairs: Path, tmp_path: Path) -> None:
    numbers, plot = tmp_path / "a.json", tmp_path / "a.png"
    with FaultServer() as server:
        told = run("agreement", pairs, *judge_options(server, tmp_path), "--out", numbers, "--plot", plot)
        again = command("agreement", pairs, *judge_options(server, tmp_path), "--json")
    assert again.out == numbers.read_text()
    assert "AI preference by order" in told and plot.stat().st_size > 1000
    (report,) = json.loads(numbers.read_text())
    shares = {row["labeller"]: row["share"] for row in report["labellers"]}
    assert shares["AI reward (m)"] == shares["AI preference (m)"] == 24 / 30
    assert shares["one person"] == pytest.approx(1 / 3)
    assert report["orders"]["first_named"] == 0.5


def test_agreement_asks_what_the_rubric_has_words_for(pairs: Path, tmp_path: Path) -> None:
    rubric = tmp_path / "mine.yaml"
    rubric.write_text('name: mine\nreward: {template: "{context} {response} SCORE:"}\n')
    with FaultServer() as server:
        said = run("agreement", pairs, *judge_options(server, tmp_path), "--rubric", rubric)
    assert "AI reward" in said and "AI preference" not in said


def test_agreement_says_why_labels_are_absent(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with FaultServer(reply="I would rather not say.") as server:
        run("agreement", pairs, *judge_options(server, tmp_path))
    for labeller in ("helpfulness:", "helpfulness (preference):"):
        line = next(line for line in caplog.messages if f"note: {labeller}" in line)
        assert "labels are absent: " in line and "I would rather not say." in line


def test_agreement_needs_no_judge(pairs: Path) -> None:
    assert "longer answer" in run("agreement", pairs)
    with pytest.raises(UserError, match="--model"):
        run("agreement", pairs, "--rubric", "helpfulness", "--base-url", "http://localhost:1/v1")


def test_a_judge_that_never_answers_is_no_success(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    with FaultServer(status=500) as server, pytest.raises(StopRun, match="nothing was labelled and nothing written"):
        run("judge", rows, *judge_options(server, tmp_path), "--set", "retries=0", "--out", tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_with_foreign_line_ends_are_read_back(tmp_path: Path) -> None:
    rows, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    texts = [f"one\u2028two\x85three {i} quality-{i + 1}" for i in range(3)]
    rows.write_text(
        "".join(json.dumps({"id": f"r{i}", "prompt": "a", "completion": t}) + "\n" for i, t in enumerate(texts))
    )
    with FaultServer() as server:
        run("judge", rows, *judge_options(server, tmp_path), "--out", out)
    assert "3" in run("granularity", out, out)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"id": "x", "response": "a", "reward": 1}\n{"id": "x", "response": "a", "reward": 2}\n', "ids must be unique"),
        ("not json\n", "expected rows with id, response and reward"),
        ('{"id": 1}\n', "expected rows with id, response and reward"),
    ],
)  # fmt: skip
def test_rewards_that_cannot_be_read_are_told(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=told):
        run("granularity", tmp_path / "a.jsonl", tmp_path / "a.jsonl")


def test_what_is_wrong_is_told_before_anything_is_bought(pairs: Path, tmp_path: Path) -> None:
    for more, told in (
        (["--set", "weight=3"], "--set weight"), (["--set", "cache=["], "not readable as YAML"), (["--plot", "x.foo"], "--plot"),
    ):  # fmt: skip
        with FaultServer() as server, pytest.raises(UserError, match=told):
            run("agreement", pairs, *judge_options(server, tmp_path), *more)
        assert server.stats.calls == 0
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for votes in ([1, 2], "two", {"a": "2"}, {"c": 1}):
        pairs.write_text(json.dumps({**rows[0], "votes": votes}) + "\n")
        with pytest.raises(UserError, match="votes: expected counts"):
            run("agreement", pairs)
    pairs.write_text(json.dumps({**rows[0], "response_a": "x\ud800"}) + "\n")
    with pytest.raises(UserError, match="half of a character"):
        run("agreement", pairs)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_prompts_of_labels_keep_calls_and_whatever_else_they_have(tmp_path: Path, suffix: str) -> None:
    calls = [{"city": "Paris", "unit": None}, {"days": 3}]
    asked = [
        [*message("user", "Weather?"),
         {"role": "assistant", "content": "", "tool_calls": [
             {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}]},
         {"role": "tool", "content": "22 C", "tool_call_id": "1", "name": "weather"}]
        for arguments in calls
    ] + [message("user", "Hi")]  # fmt: skip
    rows = [{"id": str(i), "prompt": prompt, "completion": "22", "reward": 1.0} for i, prompt in enumerate(asked)]
    out = tmp_path / f"o{suffix}"
    write_rows(out, iter(rows))
    assert [p.messages for p in load_prompts(str(out))] == asked
    assert [p.columns["reward"] for p in load_prompts(str(out))] == [1.0] * 3


def test_messages_that_parquet_cannot_hold_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "?", "meta": meta}]} for meta in ("a", 1)]
    with pytest.raises(UserError, match=r"do not fit one Parquet column: .*; write \.jsonl"):
        write_rows(tmp_path / "o.parquet", rows)
    assert not list(tmp_path.iterdir())
