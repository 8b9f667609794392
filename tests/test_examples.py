"""What stands in examples/, used as its first lines say."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer

import dualign
from command import dualign as command
from dualign import Run
from dualign.eval.report import write_report
from runs_common import reward_file, tree, write_prompts

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def recipe(tiny, tmp_path):
    """A recipe of two online batches with a reward, in a file."""
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=2)
    config["reward"] = [reward_file()]
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def refuses(said, *words):
    assert said.code == 2 and "Traceback" not in said.text
    assert all(word in said.text for word in words), said.text


def copied(name, tmp_path):
    return Path(shutil.copy(EXAMPLES / name, tmp_path / f"own_{name}"))


@pytest.mark.parametrize("name", sorted(p.name for p in EXAMPLES.glob("*.py")))
def test_an_example_is_short(name):
    assert len((EXAMPLES / name).read_text(encoding="utf-8").splitlines()) <= 40


def test_a_system_of_ones_own(recipe, tmp_path):
    file = copied("system.py", tmp_path)
    named = f"algo.name={file}:LinearlyWeighted"
    assert command("train", recipe, "--dry-run", named, "algo.scale=0.5").code == 0
    said = command("keys", f"{file}:LinearlyWeighted")
    assert said.code == 0 and "scale" in said.out and "epochs" in said.out
    refuses(command("train", recipe, named, "algo.scael=0.5"), "algo.scael: no such key; did you mean algo.scale?")
    refuses(command("train", recipe, f"algo.name={file}:Lineary"), "algo.name", "did you mean 'LinearlyWeighted'")
    assert command("train", recipe, named, "algo.scale=0.5").code == 0
    run = Run.open(tmp_path / "run")
    batch = run.batch(0).batch
    for group in batch.group_N.unique():
        rows = batch.group_N == group
        reward = batch.reward_N[rows]
        assert batch["weight"][rows].tolist() == pytest.approx(
            (1 + 0.5 * (reward - reward.mean())).clamp(min=0).tolist()
        )
    assert command("verify", run.folder).code == command("report", run.folder).code == 0
    # where its file has moved, the run goes on with it; where it has changed, not
    moved = Path(shutil.move(file, tmp_path / "moved.py"))
    more = "train.online_batches=3"
    assert command("resume", run.folder, more, f"algo.name={moved}:LinearlyWeighted").code == 0
    moved.write_text(moved.read_text().replace("min=0", "min=0.1"))
    refuses(command("resume", run.folder, "train.online_batches=4"), "algo.name: moved.py", "has changed")
    assert command("verify", run.folder).code == 1


def test_a_sampler_of_ones_own(recipe, tiny, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    texts = {f"p{i}": [f"{vowel * 3} {i}" for vowel in "aeiy"] for i in range(12)}
    lines = [
        {"id": id, "completion_ids": [*tokenizer.encode(text), tokenizer.eos_token_id]}
        for id, said in texts.items()
        for text in said
    ]
    file = tmp_path / "completions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    own = copied("sampler.py", tmp_path)
    engine = [f"rollout.engine={own}:Replay", f"rollout.options.file={file}"]
    assert "completions of every prompt" in command("keys", f"{own}:Replay").out
    said = command("train", recipe, "--dry-run", *engine)
    assert said.code == 0 and "4 of 4 held-out prompts are also in data.train" in said.out
    refuses(command("train", recipe, engine[0]), f"rollout.options.file: missing; {own}:Replay needs it")
    refuses(
        command("train", recipe, *engine, "rollout.options.flie=x"), "rollout.options.flie", "rollout.options.file?"
    )
    refuses(command("train", recipe, "--dry-run", *engine, "rollout.options.file=nope"), "no such file nope")
    refuses(command("train", recipe, *engine, "rollout.log_probs=recorded"), "0 log-probs", "log_probs=recomputed")
    short = tmp_path / "short.jsonl"
    short.write_text("".join(json.dumps(line) + "\n" for line in lines[::2]))
    said = command("train", recipe, *engine, f"rollout.options.file={short}", f"run.dir={tmp_path / 'short'}")
    refuses(said, "rollout.engine", "raised IndexError", "own_sampler.py line")
    said = command("train", recipe, *engine)
    told = " ".join(said.out.split())
    assert said.code == 0 and "also answers the held-out prompts" in told
    assert "4 of 4 held-out prompts are also in data.train" in told
    run = Run.open(tmp_path / "run")
    for row in run.batch(1).rows:
        assert row.rollout.text == texts[row.rollout.prompt.id][row.rollout.index % 4]
    assert run.metrics()[1]["reward"] is not None and "sampler_gap" not in run.metrics()[1]
    assert command("verify", run.folder).code == 0
    own.write_text(own.read_text() + "# changed\n")
    refuses(command("resume", run.folder, "train.online_batches=3"), "rollout.engine: own_sampler.py", "has changed")


def test_a_reward_of_ones_own(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = copied("reward.py", tmp_path)
    place = f"{file.name}:Brevity"
    own = "reward={type: " + place + ", target: 2, weight: 0.5}"

    said = command("keys", place)
    assert said.code == 0 and "weight" not in said.out
    assert re.search(r"target +\(whole number ≥ 1; default 80\): words that are enough", said.out)
    said = command("train", recipe, own, "--dry-run")
    assert said.code == 0 and f"reward.0: {place}, weight 0.5" in said.out and not (tmp_path / "run").exists()

    assert command("train", recipe, own).code == 0
    run = Run.open(tmp_path / "run")
    row = run.batch(0).rows[0]
    assert row.label.parts["Brevity"] <= 0 and row.label.value == 0.5 * row.label.parts["Brevity"]
    assert list(run.about["inputs"]["reward.0.type"]) == [file.name]
    monkeypatch.chdir("/")  # a run can be read without its reward
    assert command("verify", run.folder).code == command("report", run.folder).code == 0
    monkeypatch.chdir(tmp_path)
    assert command("resume", run.folder, "train.online_batches=3").code == 0 and len(run.metrics()) == 3
    for key in ("reward.0.target", "reward.0.weight"):
        refuses(command("resume", run.folder, f"{key}=3"), f"{key} cannot change on resume")

    text, more = file.read_text(), "train.online_batches=4"
    for edited in (
        text.replace("0.5, ge=0", "0.2, ge=0"),
        text.replace("target", "goal"),
        "class Brevity:\n    pass\n",
    ):
        file.write_text(edited)
        changed = f"reward.0.type: {file.name} has changed since the run began (sha256"
        refuses(command("resume", run.folder, more), changed)
        assert command("verify", run.folder).code == 1 and changed in command("verify", run.folder).out
    file.unlink()
    refuses(command("resume", run.folder, more), "its code is not there")
    (tmp_path / "moved.py").write_text(text)
    assert command("resume", run.folder, more, "reward.0.type=moved.py:Brevity").code == 0 and len(run.metrics()) == 4


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        ("{type: PLACE, targt: 3}", "reward.0.targt: no such key; did you mean reward.0.target? (PLACE)"),
        ("{type: PLACE, colour: red}", "reward.0.colour: no such key; PLACE has name, weight"),
        ("{type: PLACE, target: 0}", "reward.0.target: input should be greater than or equal to 1, not 0"),
        ("{type: PLACE, target: many}", "reward.0.target: input should be a valid integer, not 'many'"),
        ("{type: PLACEs}", "reward.0.type: its code: FILE has no 'Brevitys'; did you mean 'Brevity'?"),
        ("{type: 'nofile.py:Brevity'}", "reward.0.type: its code: no such file nofile.py"),
        ("{type: 'dualign.rewards:relevance'}", "is written {type: function, path: dualign.rewards:relevance}"),
        ("{type: function, path: PLACE}", "write {type: PLACE}"),
        ("{type: 'dualign.annotate:Item'}", "is no subclass of dualign.annotate.settings.RewardSettings"),
        ("{type: judg}", "reward.0.type: no 'judg'; did you mean judge?"),
        ("{path: x}", "reward.0.type: missing"),
        ("[5]", "reward.0: expected a mapping with a type"),
    ],
)
def test_mistakes_in_a_reward_are_named(recipe, reward, words):
    file = str(EXAMPLES / "reward.py")
    reward, words = (text.replace("PLACE", f"{file}:Brevity").replace("FILE", file) for text in (reward, words))
    refuses(command("train", recipe, f"reward={reward}", "--dry-run"), words)


def test_an_evaluation_of_ones_own(tiny, tmp_path):
    config = tree(tiny, write_prompts(tmp_path), tmp_path / "run", {"name": "dar"}, online_batches=2)
    config |= {"reward": [reward_file()], "eval": {"prompts": 12, "k": 2, "every": 1}}
    run = Path(dualign.train(config, quiet=True).folder)
    spec = f"{EXAMPLES / 'evaluation.py'}:Brevity"
    said = command("eval", spec, run, "longest=11")
    assert said.code == 0, said.text
    (file,) = (run / "eval").glob("brevity-*.json")
    result = json.loads(file.read_text())
    (table,) = result["tables"]
    texts = {step: [row.rollout.text for row in Run.open(run).read_evaluation(step)[0]] for step in range(3)}
    assert [row[:2] for row in table["rows"]] == [["π_0", 0], ["batch 1", 1], ["batch 2", 2]]
    for (*_, brief, asks), answers in zip(table["rows"], texts.values(), strict=True):
        assert len(answers) == 24 and (brief["n"], asks["n"]) == (12, 12), "two answers to each of 12 prompts"
        assert brief["value"] == pytest.approx(sum(len(text) <= 11 for text in answers) / 24)
        assert asks["value"] == pytest.approx(sum("?" in text for text in answers) / 24)
    assert 0 < table["rows"][-1][2]["value"] < 1, "the length tells answers apart"
    assert result["settings"] == {"longest": 11} and list(result["evaluation"]["files"]) == ["evaluation.py"]
    lengths = [json.loads(line)["length"] for line in file.with_suffix(".jsonl").read_text().splitlines()]
    assert sorted(lengths) == sorted(len(text) for answers in texts.values() for text in answers)
    shown = f"{table['rows'][-1][2]['value']:.1%}"
    assert shown in said.out and result["headline"] in said.out

    page = write_report([run])
    text = page.read_text(encoding="utf-8")
    assert "<h3>Brevity, last policy</h3>" in text and f"<td>{shown} [" in text and 'id="figure-brevity"' in text
    assert result["headline"] in text.replace("&#x27;", "'") and len(list(page.parent.glob("figures/brevity.*"))) == 2


def test_a_setting_that_an_evaluation_does_not_have(tmp_path):
    spec = f"{EXAMPLES / 'evaluation.py'}:Brevity"
    said = command("eval", spec, "--help")
    assert said.code == 0 and re.search(
        r"Settings of .*:Brevity, as key=value:\s+longest +\(whole number; default 200\)", said.out
    )
    for setting, told in (
        ("longst=5", "longst: no such key; did you mean longest?"),
        ("words=5", "words: no such key; it has longest"),
        ("longest=long", "longest: input should be a valid integer, not 'long'"),
    ):
        refuses(command("eval", spec, tmp_path, setting), told)
