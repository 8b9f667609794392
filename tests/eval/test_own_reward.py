"""A run is judged by its own reward, with all that this reward reads, and shows nobody else's figures."""

import csv
import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dualign
from conftest import make_model, make_tokenizer
from dualign.cli import application
from dualign.common.errors import UserError
from dualign.eval.asking import Asking
from dualign.eval.evaluate import mean_reward, win_rate
from dualign.eval.report import write_report
from dualign.eval.report.data import collect
from runs_common import tree

HERE = Path(__file__)


def total(completion):
    text = completion[0]["content"] if isinstance(completion, list) else completion
    return float(sum(map(ord, text)) % 17)


def sums(completions, **columns):
    return [total(c) for c in completions]


def negative(completions, **columns):
    return [-total(c) for c in completions]


def short(completions, completion_ids, **columns):
    return [-float(len(ids)) for ids in completion_ids]


def python_only(completions, **columns):
    return [2.0 * total(c) for c in completions]


def function(name, **more):
    return {"type": "function", "path": f"{HERE}:{name}", **more}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def cli(*arguments):
    return CliRunner().invoke(application(), [str(a) for a in arguments], catch_exceptions=False)


def rewards_of(path):
    return [[p["reward"]["value"] for p in s["points"]] for s in json.loads(Path(path).read_text())["systems"]]


def train(folder, tiny, prompts, rewards, reward=()):
    config = tree(tiny, prompts, folder, {"name": "dar"}, online_batches=1, online_batch=32, update_size=32)
    config["reward"] = rewards
    config["eval"] = {"prompts": 8, "k": 2}
    return dualign.train(config, reward=reward, quiet=True).folder


@pytest.fixture(scope="module")
def world(tiny, tmp_path_factory):
    """Runs whose folders end alike, each with another reward."""
    folder = tmp_path_factory.mktemp("own")
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"say {i}"}], "kind": "ab"[i % 2]} for i in range(8)]
    prompts = write(folder / "prompts.jsonl", rows)
    a = train(folder / "a" / "run", tiny, prompts, [function("short")])
    b = train(
        folder / "b" / "run", tiny, prompts, [function("sums"), function("negative", where={"kind": "a"}, weight=10)]
    )
    c = train(folder / "c" / "run", tiny, prompts, [function("sums")], reward=python_only)
    return {"folder": folder, "prompts": prompts, "rows": rows, "a": a, "b": b, "c": c}


def summary(run):
    found = json.loads((run / "summary.json").read_text())
    return [found[when]["reward"] for when in ("before", "after")]


def test_a_reward_gets_the_tokens_of_every_answer(world):
    assert cli("eval", "reward", world["a"]).exit_code == 0
    assert rewards_of(world["a"] / "eval" / "reward-run.json")[0] == pytest.approx(summary(world["a"]))
    out = world["folder"] / "sampled" / "ids.json"
    cli("eval", "reward", world["a"], "--prompts", world["prompts"], "--max-new-tokens", 8, "--out", out)
    kept = [[json.loads(line) for line in f.read_text().splitlines()] for f in out.parent.glob("outputs/*.jsonl")]
    right = [-sum(len(row["completion_ids"]) for row in rows) / len(rows) for rows in kept]
    assert sorted(rewards_of(out)[0]) == pytest.approx(sorted(right)) and min(right) < 0


def test_outputs_without_tokens_are_refused_by_a_reward_that_reads_them(world, tmp_path):
    outputs = write(tmp_path / "o.jsonl", [{"prompt": row["prompt"], "completion": "abc"} for row in world["rows"]])
    with pytest.raises(UserError, match="short takes 'completion_ids', which the data does not have"):
        cli("eval", "winrate", world["a"], "--against", outputs)


def test_a_reward_gets_the_columns_of_the_prompts(world):
    assert cli("eval", "reward", world["b"]).exit_code == 0
    assert rewards_of(world["b"] / "eval" / "reward-run.json")[0] == pytest.approx(summary(world["b"]))
    out = world["folder"] / "columns" / "reward.json"
    cli("eval", "reward", world["b"], "--prompts", world["prompts"], "--max-new-tokens", 8, "--out", out)
    kind = {row["id"]: row["kind"] for row in world["rows"]}
    right = []
    for file in out.parent.glob("outputs/*.jsonl"):
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        values = [total(row["completion"]) * (1 - 10 * (kind[row["id"]] == "a")) for row in rows]
        right.append(sum(values) / len(values))
    assert sorted(rewards_of(out)[0]) == pytest.approx(sorted(right))


def test_the_other_side_of_a_comparison_has_the_columns_too(world, tmp_path):
    """Outputs from elsewhere hold a prompt and an answer; what the reward reads beside them are the prompt's columns."""
    high = "a" + next(chr(c) for c in range(97, 123) if (97 + c) % 17 == 16)
    outputs = write(tmp_path / "o.jsonl", [{"prompt": row["prompt"], "completion": high} for row in world["rows"]])
    result = win_rate([str(world["b"])], against=str(outputs), out=tmp_path / "x.json")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    theirs = {row["id"]: row["scores"][1] for row in rows}
    assert theirs == {row["id"]: 16.0 if row["kind"] == "b" else -144.0 for row in world["rows"]}
    assert result.record["systems"][0]["points"][0]["win_rate"]["n"] == 8


def test_a_python_reward_is_refused_by_name_until_it_is_given(world):
    with pytest.raises(
        UserError, match=r"trained with the Python function python_only, which its config does not name"
    ):
        cli("eval", "reward", world["c"])
    result = mean_reward([str(world["c"])], reward=python_only)
    assert rewards_of(result.path)[0] == pytest.approx(summary(world["c"]))
    assert cli("eval", "reward", world["c"], "--function", f"{HERE}:python_only").exit_code == 0
    assert rewards_of(result.path)[0] == pytest.approx(summary(world["c"]))
    assert [s["type"] for s in result.record["systems"][0]["judge"]["settings"]] == ["function", "python"]
    with pytest.raises(
        UserError, match="--function sums: no run here was given it in Python; those given: python_only"
    ):
        cli("eval", "winrate", world["c"], "--function", f"{HERE}:sums")
    with pytest.raises(UserError, match="another judge is named"):
        cli("eval", "winrate", world["c"], "--judge", f"{HERE}:sums", "--function", f"{HERE}:python_only")


def test_of_several_runs_each_is_judged_by_its_own(world, tmp_path):
    out = tmp_path / "both.json"
    done = cli("eval", "reward", world["b"], world["a"], "--out", out)
    assert rewards_of(out) == [pytest.approx(summary(world["b"])), pytest.approx(summary(world["a"]))]
    assert "short" in done.stdout and "sums + negative" in done.stdout
    result = win_rate([str(world["a"]), str(world["b"])], out=tmp_path / "rates.json")
    names = [s["judge"]["name"] for s in result.record["systems"]]
    assert names == ["short", "sums + negative"] and "seeds" not in result.record
    assert len({s["judge"]["digest"] for s in result.record["systems"]}) == 2


def test_what_is_no_run_beside_runs_of_different_rewards_is_refused(world, tmp_path):
    outputs = write(tmp_path / "o.jsonl", [{"prompt": row["prompt"], "completion": "abc"} for row in world["rows"]])
    with pytest.raises(UserError, match=r"is no run, and the runs beside it .* were trained on different rewards"):
        cli("eval", "reward", outputs, world["a"], world["b"], "--out", tmp_path / "x.json")


def test_results_are_kept_by_opponent_and_say_against_whom(world, tmp_path):
    run = Path(shutil.copytree(world["b"], tmp_path / "run"))
    shutil.rmtree(run / "eval", ignore_errors=True)
    files = []
    for place, answer in (("x", "zzz"), ("y", "b")):  # files whose names end alike
        rows = [{"prompt": row["prompt"], "completion": answer} for row in world["rows"]]
        files.append(write(tmp_path / place / "other.jsonl", rows))
    cli("eval", "winrate", run)
    for file in files:
        assert str(file) in cli("eval", "winrate", run, "--against", file).stdout.replace("\n", "")
    cli("eval", "winrate", run, "--against", world["a"])
    kept = sorted((run / "eval").glob("winrate-run*.json"))
    assert len(kept) == 4 and (run / "eval" / "winrate-run.json") in kept
    opponents = {json.loads(f.read_text())["systems"][0]["against"]["name"] for f in kept}
    assert opponents == {"π_0", *map(str, files), f"{world['a']}, batch 1"}
    page = write_report([run]).read_text()
    for name in opponents:
        assert f"Win rate against {name}, last policy" in page
    rows = csv.DictReader((run / "report" / "figures" / "winrate.csv").open(encoding="utf-8"))
    assert {row["against"] for row in rows} == opponents


def test_runs_whose_folders_end_alike_show_their_own(world, tmp_path):
    runs = [Path(shutil.copytree(world[name], tmp_path / name / "run")) for name in "ab"]
    for run in runs:
        shutil.rmtree(run / "eval", ignore_errors=True)
    result = win_rate(list(map(str, runs)))
    assert result.path.parent.parent == runs[0]
    (rate,) = collect(runs[:1])[0].tables
    points = json.loads(result.path.read_text())["systems"][0]["points"]
    assert rate.numbers("win rate [95 %]") == [p["win_rate"] for p in points] and rate.about["judge"] == "short"
    assert collect(runs[1:])[0].tables == []
    moved = shutil.move(tmp_path / "a", tmp_path / "elsewhere")  # a result goes with its run
    assert len(collect([Path(moved) / "run"])[0].tables) == 1
    mean_reward([str(runs[1]), str(Path(moved) / "run")], out=Path(moved) / "run" / "eval" / "reward-run.json")
    found, _ = collect([Path(moved) / "run"])[0].tables
    assert (found.title, found.about["judge"]) == ("Mean reward", "run: short")


def test_results_of_before_are_shown_as_far_as_they_tell(world, tmp_path):
    run = Path(shutil.copytree(world["b"], tmp_path / "run"))
    shutil.rmtree(run / "eval", ignore_errors=True)
    result = win_rate([str(run)])
    old = json.loads(result.path.read_text())
    del old["headline"], old["tables"]
    for system in old["systems"]:
        for key in ("run", "judge", "against", "sampling"):
            del system[key]
    old["systems"].append(old["systems"][0] | {"source": "elsewhere/run"})
    result.path.write_text(json.dumps(old))
    (rate,) = collect([run])[0].tables
    assert rate.notes[-1] == "how it was asked: unknown; reward unknown" and rate.about["against"] == "π_0"
    assert rate.numbers("win rate [95 %]") == [p["win_rate"] for p in old["systems"][0]["points"]]


def test_results_carry_what_made_them(world, tmp_path):
    asking = Asking(str(world["prompts"]), max_new_tokens=8, temperature=1.0, k=2, seed=3)
    result = win_rate([str(world["b"])], asking=asking, out=tmp_path / "x.json")
    (system,) = json.loads(result.path.read_text())["systems"]
    assert system["sampling"] == {
        "prompts": str(world["prompts"]), "asked": 8, "chat": False, "system_prompt": None, "k": 2,
        "max_new_tokens": 8, "temperature": 1.0, "seed": 3,
    }  # fmt: skip
    assert system["points"][0]["win_rate"]["n"] == 8 and system["judge"]["digest"] == result.record["judge"]["digest"]


def test_another_function_under_the_same_name_has_another_digest(world, tmp_path):
    digests = []
    for body in ("return [1.0 for c in completions]", "return [2.0 for c in completions]"):
        (tmp_path / "rw.py").write_text(f"def f(completions, **columns):\n    {body}\n")
        result = mean_reward([str(world["b"])], judge=f"{tmp_path}/rw.py:f", out=tmp_path / "x.json")
        digests.append(result.record["systems"][0]["judge"]["digest"])
    assert digests[0] != digests[1]


def test_outputs_of_another_model_under_the_same_name_are_not_reused(tiny, world, tmp_path):
    model = Path(shutil.copytree(tiny, tmp_path / "model"))
    arguments = ["eval", "reward", model, "--judge", f"{HERE}:sums", "--prompts", world["prompts"],
                 "--max-new-tokens", 4, "--out", tmp_path / "x.json"]  # fmt: skip
    for count, change in enumerate(([], ["--max-new-tokens", 5], [])):
        if count == 2:
            generation = json.loads((model / "generation_config.json").read_text())
            (model / "generation_config.json").write_text(json.dumps(generation | {"eos_token_id": [256, 97]}))
        assert cli(*arguments, *change).exit_code == 0
        assert len(list((tmp_path / "outputs").iterdir())) == count + 1


def test_a_reward_that_may_have_changed_since_the_run_is_said(tiny, world, tmp_path):
    code = tmp_path / "rw.py"
    code.write_text("def f(completions, **columns):\n    return [1.0 for c in completions]\n")
    config = tree(tiny, world["prompts"], tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["reward"] = [{"type": "function", "path": f"{code}:f"}]
    run = str(dualign.train(config, quiet=True).folder)
    assert "changed" not in mean_reward([run]).record["systems"][0]["judge"]
    code.write_text("def f(completions, **columns):\n    return [2.0 for c in completions]\n")
    told = cli("eval", "reward", run)
    assert "not surely what the run was trained on" in told.stdout.replace("\n", " ")
    (found,) = collect([Path(run)])[0].tables
    assert "rw.py has changed" in found.notes[0]

    def python_only(completions, **columns):
        return [3.0 for c in completions]

    with pytest.raises(UserError, match=r"reward function 0 \(python_only\): .* changed since the run began"):
        mean_reward([str(world["c"])], reward=python_only)


def test_pi_0_is_the_reference_that_a_run_names(tiny, world, tmp_path):
    """And what training started from is not called π_0."""
    tokenizer = make_tokenizer()
    reference = tmp_path / "reference"
    make_model("llama", len(tokenizer), tokenizer.eos_token_id, seed=1).save_pretrained(reference)
    tokenizer.save_pretrained(reference)
    config = tree(tiny, world["prompts"], tmp_path / "run", {"name": "dar"}, online_batches=1)
    config["model"] |= {"reference": str(reference), "precision": "bf16"}  # as models are sampled by name
    run = str(dualign.train(config, reward=sums, quiet=True).folder)
    result = win_rate([run], reward=sums)
    assert [p["b"] for p in result.record["systems"][0]["points"]] == ["the start"]
    asking = Asking(str(world["prompts"]), max_new_tokens=6)
    result = mean_reward([run, str(reference), str(tiny)], reward=sums, asking=asking, out=tmp_path / "x.json")
    of_run, *others = [{p["name"]: p["reward"]["value"] for p in s["points"]} for s in result.record["systems"]]
    assert list(of_run) == ["π_0", "the start", "batch 1"]
    assert [of_run["π_0"], of_run["the start"]] == [value for other in others for value in other.values()]
