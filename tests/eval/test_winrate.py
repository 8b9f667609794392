"""Win rates and rewards of outputs, runs and judges whose truth is known."""

import json
import sqlite3
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

import dualign
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.common.intervals import FEW
from dualign.data.rows import load_prompts
from dualign.eval import cost, rewards
from dualign.eval.judges import judge_pairs, open_judge
from dualign.eval.outputs import Generation, Outputs, generate, grouped, points, read
from dualign.eval.result import Result
from dualign.eval.show import show
from dualign.eval.winrate import measure, of_point, tables
from dualign.models.settings import ModelConfig
from fault_server import FaultServer
from runs_common import tree, vowels, write_prompts

LENGTH = f"{Path(__file__)}:by_length"
VOWELS = f"{Path(__file__).parents[1] / 'support' / 'runs_common.py'}:vowels"


def by_length(completions, **columns):
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [None if t == "?" else float(len(t)) for t in texts]


def outputs(folder, name, texts) -> Outputs:
    path = folder / f"{name}.jsonl"
    rows = [{"id": f"{name}{i}", "prompt": f"question {i}", "completion": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Outputs(name, grouped(read(path)))


def run_cli(*arguments):
    return CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False)


def test_scores_win_tie_lose_and_absent(tmp_path):
    a = outputs(tmp_path, "a", ["long", "same", "s", "?", "longer"])
    b = outputs(tmp_path, "b", ["xx", "also", "yyy", "zz", "b"])
    pairs = judge_pairs(open_judge(LENGTH), a, b)
    assert [p.value for p in pairs] == [1, 0.5, 0, None, 1]
    found = measure(a, b, pairs)
    assert (found["won"], found["tied"], found["lost"], found["absent"]) == (2, 1, 1, 1)
    assert found["win_rate"]["value"] == 0.625 and found["win_rate"]["n"] == 4
    assert found["swap_consistency"] is None and found["absent_reasons"]


def judge_at(server, folder, **more):
    spec = {"type": "preference", "rubric": "helpfulness", "base_url": server.url, "model": "m"}
    return open_judge(json.dumps(spec | {"cache": str(folder / "cache.sqlite")} | more))


def test_a_preference_judge_is_asked_in_both_orders(tmp_path):
    a = outputs(tmp_path, "a", [f"quality-{q}" for q in (9, 2, 5, 8)])
    b = outputs(tmp_path, "b", [f"quality-{q}" for q in (1, 7, 4, 3)])
    with FaultServer(faults=0.0, latency=0.0) as server:
        with judge_at(server, tmp_path) as judge:
            found = measure(a, b, judge_pairs(judge, a, b))
        assert server.stats.calls == 8
        with judge_at(server, tmp_path) as judge:
            again = measure(a, b, judge_pairs(judge, a, b))
        assert server.stats.calls == 8, "nothing is bought twice"
    assert found == again
    assert (found["win_rate"]["value"], found["swap_consistency"], found["first_named"]) == (0.75, 1.0, 0.5)


def test_a_judge_that_follows_position_wins_nothing(tmp_path):
    a, b = outputs(tmp_path, "a", ["one", "two"]), outputs(tmp_path, "b", ["three", "four"])
    with FaultServer(faults=0.0, latency=0.0, reply="1") as server, judge_at(server, tmp_path) as judge:
        found = measure(a, b, judge_pairs(judge, a, b))
    assert (found["win_rate"]["value"], found["swap_consistency"], found["first_named"]) == (0.5, 0.0, 1.0)


def test_outputs_meet_by_prompt_in_any_format(tmp_path):
    a = outputs(tmp_path, "a", ["aaaa", "bb"])
    alpaca = [{"instruction": f"question {i}", "output": "ccc", "generator": "x"} for i in (1, 0, 7)]
    (tmp_path / "b.json").write_text(json.dumps(alpaca))
    b = Outputs("b", grouped(read(tmp_path / "b.json")))
    assert [p.value for p in judge_pairs(open_judge(LENGTH), a, b)] == [1, 0]
    with pytest.raises(UserError, match="no prompt in common"):
        judge_pairs(open_judge(LENGTH), a, Outputs("c", {}))
    (tmp_path / "bad.json").write_text('[{"question": "?"}]')
    with pytest.raises(UserError, match=r"bad\.json: expected a list of objects with instruction and output"):
        read(tmp_path / "bad.json")


def test_a_second_judge_that_hates_the_gain_is_heard(tmp_path):
    before = outputs(tmp_path, "before", ["aeiou", "xy", "xyzx", "bcd"] * 5)
    after = outputs(tmp_path, "after", ["xxxxxxxxx", "xyzzy", "bbbbbbbb", "cccccc"] * 5)
    points = [before, after]
    length, vowel = (rewards.scored(open_judge(spec), points) for spec in (LENGTH, VOWELS))
    table = rewards.curve(points, length)
    assert table[0]["gain"]["value"] == 0 and table[1]["gain"]["low"] > 0
    swap = rewards.swap(points, length, vowel)
    assert swap["survives"] != "yes" and swap["all"]["pearson"] < 0.5
    assert all(d["first_gain_sd"] * d["second_gain_sd"] < 0 for d in swap["disagreements"]) and swap["disagreements"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A run that learns, with evaluations and checkpoints on the way."""
    folder = tmp_path_factory.mktemp("run")
    config = tree(tiny, write_prompts(folder), folder / "run", {"name": "dar", "beta": 0.3}, online_batches=20, lr=3e-3)
    config["eval"] |= {"prompts": 12, "every": 10}
    config["run"]["checkpoints"] = 2
    return dualign.train(config, reward=vowels, quiet=True).folder


def test_winrate_of_a_run_over_its_evaluations(run):
    done = run_cli("eval", "winrate", run, "--judge", VOWELS)
    assert done.exit_code == 0 and "win rate" in done.stdout
    result = json.loads(next((run / "eval").glob("winrate-*.json")).read_text())
    points = result["systems"][0]["points"]
    assert [(p["batches"], p["labels"], p["b"]) for p in points] == [(10, 160, "π_0"), (20, 320, "π_0")]
    assert points[-1]["win_rate"]["low"] > 0.5, "it learned, so it wins"
    assert result["judge"]["settings"][0]["type"] == "function" and result["versions"]["dualign"]
    assert result["systems"][0]["cost"]["labels"] == 320
    verdicts = [json.loads(line) for line in next((run / "eval").glob("winrate-*.jsonl")).read_text().splitlines()]
    assert len(verdicts) == 24 and {v["point"] for v in verdicts} == {"batch 10", "batch 20"}


def test_checkpoints_are_sampled_once(run, tmp_path):
    prompts = run.parent / "prompts.jsonl"
    arguments = ["eval", "winrate", run, "--judge", LENGTH, "--prompts", prompts, "--limit", 6, "--max-new-tokens", 8]
    assert run_cli(*arguments, "--out", tmp_path / "a.json").exit_code == 0
    kept = {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").iterdir()}
    assert len(kept) == 3  # π_0 and two checkpoints
    assert run_cli(*arguments, "--out", tmp_path / "b.json").exit_code == 0
    assert kept == {p: p.stat().st_mtime_ns for p in (tmp_path / "outputs").iterdir()}
    a, b = (json.loads((tmp_path / f"{x}.json").read_text()) for x in "ab")
    assert a["systems"] == b["systems"] and a["prompts"] == 6


def test_models_and_files_need_to_know_against_what(run, tiny, tmp_path):
    outputs(tmp_path, "a", ["aaaa", "bb"])
    with pytest.raises(UserError, match="against what"):
        run_cli("eval", "winrate", tmp_path / "a.jsonl", "--judge", LENGTH, "--out", tmp_path / "x.json")
    with pytest.raises(UserError, match="name prompts with --prompts"):
        run_cli("eval", "reward", tiny, "--judge", LENGTH, "--out", tmp_path / "x.json")
    with pytest.raises(UserError, match="say how to sample on --prompts"):  # not left out in silence
        run_cli("eval", "winrate", run, "--judge", LENGTH, "--limit", 2, "--out", tmp_path / "x.json")
    outputs(tmp_path, "b", ["a", "bbbb"])
    files = [tmp_path / "a.jsonl", "--against", tmp_path / "b.jsonl"]
    assert run_cli("eval", "winrate", *files, "--judge", LENGTH, "--out", tmp_path / "x.json").exit_code == 0
    assert json.loads((tmp_path / "x.json").read_text())["systems"][0]["points"][0]["win_rate"]["value"] == 0.5


def test_reward_curve_and_judge_swap_of_a_run(run, tmp_path):
    out = tmp_path / "reward.json"
    done = run_cli("eval", "reward", run, "--judge", VOWELS, "--second", LENGTH, "--out", out)
    assert done.exit_code == 0 and "does the gain survive" in done.stdout
    system = json.loads(out.read_text())["systems"][0]
    assert [p["batches"] for p in system["points"]] == [0, 10, 20]
    assert system["points"][-1]["gain"]["low"] > 0
    assert {"all", "last", "gains", "survives", "disagreements"} <= set(system["swap"])


def test_several_runs_are_seeds(run, tmp_path):
    out = tmp_path / "seeds.json"
    assert run_cli("eval", "winrate", run, run, "--judge", VOWELS, "--out", out).exit_code == 0
    seeds = json.loads(out.read_text())["seeds"]
    assert seeds["over_seeds"]["n"] == 2 and seeds["over_seeds"]["low"] == seeds["over_seeds"]["high"]  # equal seeds
    assert seeds["over_prompts"]["n"] == 12 and seeds["over_prompts"]["low"] < seeds["over_prompts"]["high"]


@pytest.mark.parametrize("prompts", [FEW - 1, FEW])
def test_few_prompts_have_no_length_control_price_or_verdict(prompts, tmp_path, run, capsys):
    """And the output says why."""
    a = outputs(tmp_path, "a", ["a" * (i % 7 + 3) for i in range(prompts)])
    b = outputs(tmp_path, "b", ["b" * (i % 5 + 2) for i in range(prompts)])
    point = measure(a, b, judge_pairs(open_judge(LENGTH), a, b))
    few = prompts < FEW
    assert bool(point["by_length"]) != few and (point["length_controlled"]["n"] == prompts)
    assert np.isnan(point["length_controlled"]["value"]) == few
    assert point["win_rate"]["low"] < point["win_rate"]["value"] < point["win_rate"]["high"] <= 1
    system = {"source": "a", "points": [point], **cost.of_system(str(run), point)}
    assert (system["cost_per_point"] is None) == few and system["cost"]["labels"] == 320
    show(Result((), "", tables({"systems": [system], "judge": {"name": "length"}})))
    said = capsys.readouterr().out
    told = f"{prompts} prompts are too few for a verdict ({FEW} are needed)"
    assert (f"no length control: {told}" in said) == (f"no cost per point of win rate: {told}" in said) == few
    assert (told in rewards.survival({str(i): 1.0 + i for i in range(prompts)})) == few
    assert (told in of_point(point)) == few


def test_cost_reads_the_account(run):
    with sqlite3.connect(run / "spent.sqlite") as db:
        db.execute("CREATE TABLE account (name, calls, prompt_tokens, completion_tokens, picodollars)")
        db.execute("INSERT INTO account VALUES ('m', 100, 3000, 1000, 2000000000000)")
    found = cost.cost_of(run)
    assert (found["calls"], found["tokens"], found["dollars"]) == (100, 4000, 2.0)
    assert cost.per_point(found, 0.6)["dollars"] == pytest.approx(0.2)
    assert cost.per_point(found, 0.5)["dollars"] is None
    (run / "spent.sqlite").unlink()


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("{type: judge}", "missing|required"),
        ("nowhere.yaml", "no such file"),
        ("run", "nothing that is evaluated is a run"),
    ],
)
def test_bad_judges_are_named(spec, told):
    with pytest.raises(UserError, match=told):
        open_judge(spec)


def test_a_comparing_judge_gives_no_rewards(tmp_path):
    told = pytest.raises(UserError, match="compares two answers and scores none")
    with FaultServer(faults=0.0, latency=0.0) as server, judge_at(server, tmp_path) as judge, told:
        rewards.scored(judge, [outputs(tmp_path, "a", ["x"])])


def test_pi_0_of_a_run_is_asked_in_the_runs_own_chat_template(tiny, tmp_path):
    """Named by model.name alone it would answer in the model's own template, and the gain would be the template's."""
    (tmp_path / "loud.jinja").write_text("{% for m in messages %}LOUD {{ m.content }}{% endfor %}")
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["model"]["chat_template"] = str(tmp_path / "loud.jinja")
    config["reward"] = [{"type": "function", "path": VOWELS}]
    run = dualign.train(config, quiet=True).folder
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": [{"role": "user", "content": f"say {i}"}]}) + "\n" for i in range(4))
    )
    how = Generation(load_prompts(str(prompts)), 8, 0.0, 1, 0, tmp_path / "outputs")
    first, _ = points(str(run), how)
    loud = ModelConfig(name=str(tiny), precision="fp32", chat_template=str(tmp_path / "loud.jinja"))
    plain = ModelConfig(name=str(tiny), precision="fp32")
    said = [[a.text for a in generate(m, replace(how, folder=tmp_path / "others"))] for m in (loud, plain)]
    assert [a.text for a in first] == said[0] != said[1]
    assert AutoTokenizer.from_pretrained(run / "checkpoints" / "000001").chat_template.startswith(
        "{% for m in messages %}LOUD"
    )


def test_plain_prompts_are_asked_as_chat_where_said_so_and_kept_apart(tiny, tmp_path):
    """One file of plain text, asked both ways: other answers, and neither's are taken for the other's."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {i}: "}) + "\n" for i in range(6)))
    said = []
    for n, option in enumerate(([], ["--chat"], ["--no-chat"])):
        arguments = ["--judge", LENGTH, "--prompts", prompts, "--max-new-tokens", 8, *option]
        assert run_cli("eval", "reward", tiny, *arguments, "--out", tmp_path / f"{n}.json").exit_code == 0
        said.append({p.name: p.read_text() for p in (tmp_path / "outputs").iterdir()})
    assert [len(files) for files in said] == [1, 2, 2]
    first, second = (next(said[1][n] for n in names) for names in (said[0], set(said[1]) - set(said[0])))
    assert first != second


def test_a_corrected_win_rate_stands_beside_the_raw_one(tmp_path):
    """The judge prefers the policy on 18 of 24 prompts, and is known to side with people on 80 % of 200 pairs."""
    for name, quality in (("policy", lambda i: 9 if i < 18 else 1), ("other", lambda i: 5)):
        outputs(tmp_path, name, [f"{name} {i} quality-{quality(i)}" for i in range(24)])
    rows = [{"labeller": "AI preference (m)", "rubric": "helpfulness", "share": 0.8, "pairs": 200}]
    (tmp_path / "errors.json").write_text(json.dumps([{"labellers": rows}]))
    with FaultServer() as server:
        judge = {"type": "preference", "rubric": "helpfulness", "base_url": server.url, "model": "m",
                 "cache": str(tmp_path / "c.sqlite")}  # fmt: skip
        asks = ["eval", "winrate", tmp_path / "policy.jsonl", "--against", tmp_path / "other.jsonl", "--out",
                tmp_path / "w.json", "--judge-errors", tmp_path / "errors.json", "--judge"]  # fmt: skip
        said = run_cli(*asks, json.dumps(judge))
        with pytest.raises(UserError, match=r"knows nothing of AI preference \(m\) with rubric harmlessness"):
            run_cli(*asks, json.dumps(judge | {"rubric": "harmlessness"}))
    assert said.exit_code == 0 and "corrected for the judge's errors" in said.output
    point = json.loads((tmp_path / "w.json").read_text())["systems"][0]["points"][-1]
    assert point["win_rate"]["value"] == 0.75 and point["corrected"]["value"] == pytest.approx((0.75 - 0.2) / 0.6)
    assert point["corrected"]["high"] - point["corrected"]["low"] > point["win_rate"]["high"] - point["win_rate"]["low"]
